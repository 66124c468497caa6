"""What is timed: one shape of one operator, and the same loss in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One shape of one operator.

    Attributes
    ----------
    name
        "operator shape", and the dtype if it is not float32.
    fused, reference
        The function timed, and the one that, in float64, says what is right.
    baselines
        The same function in plain PyTorch, by the name of the form.
    nearest
        The nearest function of Liger, if there is one: it may compute something else.
    inputs
        Makes the inputs, float32, on PyTorch's default device.
    learning
        How many of them, the first ones, get gradients.
    values_moved
        How many values a separate forward and backward must read and write at least.
    grad
        Makes the gradient that comes in, where the result is a map.
    part
        A call that does a part of the same, timed beside it; `part_name` says which.
    proof
        Stands for the case where functions are compared, if they are random (then without the
        randomness) or the case is large (then with fewer rows).
    rows
        Whether gradients have rows of classes, in which an error is relative to the row's largest;
        else to the tensor's.
    need
        What the ratios must be: at least, against "eager" and "compile"; at most, against "copy",
        "part" and, of the memory that a call takes at its peak, against eager's: "memory".
    environment
        Environment variables of the process that runs the case.
    dtype
        Of the inputs, but for those at `accumulators`, which are float32 (float64 for float64).
    widen
        Whether baselines bring inputs of half types to float32, as autocast does for losses.
    """

    name: str
    fused: Loss
    reference: Loss
    baselines: Mapping[str, Loss]
    inputs: Callable[[], list[Tensor]]
    learning: int
    values_moved: int
    need: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    nearest: Loss | None = None
    part: Loss | None = None
    part_name: str = "a call with one teacher less"
    proof: Case | None = None
    grad: Callable[[], Tensor] | None = None
    rows: bool = True
    dtype: str = "float32"
    accumulators: tuple[int, ...] = ()
    widen: bool = True

    @property
    def operator(self) -> str:
        return self.name.split()[0]

    @property
    def bytes_moved(self) -> int:
        return self.values_moved * int(getattr(torch, self.dtype).itemsize)

    def of_dtype(self, dtype: str) -> Case:
        """The same case on inputs of `dtype`; bounds are stated for one dtype and do not come along."""
        if dtype == self.dtype:
            return self
        proof = self.proof.of_dtype(dtype) if self.proof else None
        return replace(self, name=f"{self.name} {dtype}", dtype=dtype, need={}, proof=proof)

    def draw(self, device: str) -> tuple[list[Tensor], Tensor | None]:
        """Make the inputs, and the gradient that comes in if the result is a map; always the same."""
        torch.manual_seed(0)
        with torch.device(device):
            inputs, grad = self.inputs(), self.grad() if self.grad else None
        dtype = getattr(torch, self.dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = [
            x.to(device, wide if k in self.accumulators else dtype)
            if x.is_floating_point()
            else x.to(device)
            for k, x in enumerate(inputs)
        ]
        for x in inputs[: self.learning]:
            x.requires_grad_()
        return inputs, None if grad is None else grad.to(dtype)


def wide(x: Any) -> Any:
    """`x` in float32 if it is a tensor of a half type."""
    is_half = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if is_half else x


def widened(loss: Loss) -> Loss:
    """`loss` of inputs in float32."""

    def call(*inputs: Tensor) -> Tensor:
        return loss(*map(wide, inputs))

    return call
