"""What the previous epoch predicted, by sample: AI-KD's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import arguments

_INTEGERS = {  # as wide as a table's numbers
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class PreviousEpoch(nn.Module):
    """The predictive probabilities of the previous epoch, by sample index.

    In each step ``lookup(index)`` gives what the previous epoch knew and ``update(index, logits)``
    writes what this one knows; ``end_epoch()`` makes this epoch the previous one. The order of the
    samples does not matter, so shuffled loaders are fine, but each epoch must see every sample
    that the next looks up (a loader with ``drop_last=True`` does not).

    Parameters
    ----------
    num_samples, num_classes
        Size of the data set, and of a prediction.
    dtype
        Of the tables. In float16 a probability below 3e-8 becomes 0. ``.half()`` and the like of a model
        that holds this module leave the tables as they are.
    rewrite
        Allow an index to be written again in one epoch (several views of a sample, sampling with
        replacement): the last write counts. Otherwise that is an error, since it is what happens where
        ``end_epoch()`` is forgotten.

    Notes
    -----
    Memory: two tables of num_samples x num_classes, on every rank, and 3 bytes a sample. In
    float16: 20 MB for CIFAR-100, 5.1 GB for ImageNet-1k; ``.to(device)`` decides where. Where that is
    a GPU, the check of the indices waits for it once in each call.

    Several ranks: when :mod:`torch.distributed` is initialised, ``end_epoch()`` is a collective call
    after which all ranks hold the same table. Where two ranks wrote one index (a
    ``DistributedSampler`` repeats some to give all ranks as many), the lower rank's row counts; in a
    batch that holds an index twice, its first row. The tables must be on a device that the process
    group serves. Do not make this a part of a model in ``DistributedDataParallel``, which would
    copy rank 0's tables over the others' in each step.

    Checkpoints: ``state_dict()`` holds both tables, so training may resume in the middle of an
    epoch. On several ranks call ``gather()`` on all of them before one saves.

    Examples
    --------
    >>> previous = PreviousEpoch(len(dataset), 100)
    >>> for index, images, labels in loader:
    ...     logits = student(images)
    ...     loss, parts = criterion(logits, teacher(images), previous.lookup(index), labels)
    ...     previous.update(index, logits)
    >>> previous.end_epoch()
    """

    previous: torch.Tensor
    current: torch.Tensor
    previous_written: torch.Tensor
    current_written: torch.Tensor
    _own: torch.Tensor

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        dtype: torch.dtype = torch.float16,
        *,
        rewrite: bool = False,
    ) -> None:
        super().__init__()
        arguments.at_least("PreviousEpoch", "num_samples", num_samples, 1)
        arguments.at_least("PreviousEpoch", "num_classes", num_classes, 1)
        if not isinstance(dtype, torch.dtype) or dtype not in _INTEGERS:
            found = dtype if isinstance(dtype, torch.dtype) else arguments.described(dtype)
            raise TypeError(
                f"PreviousEpoch: dtype is {str(found).removeprefix('torch.')}, expected "
                "torch.float16, torch.bfloat16, torch.float32 or torch.float64"
            )
        self.rewrite = arguments.flag("PreviousEpoch", "rewrite", rewrite)
        for name in ("previous", "current"):
            self.register_buffer(name, torch.zeros(num_samples, num_classes, dtype=dtype))
            self.register_buffer(f"{name}_written", torch.zeros(num_samples, dtype=torch.bool))
        # What this process has written in this epoch: not what other ranks wrote, nor what a checkpoint
        # holds, whose epoch may be run again from its start.
        self.register_buffer("_own", torch.zeros(num_samples, dtype=torch.bool), persistent=False)
        self.epochs = 0  # number of those that have ended
        self._has_logits = False  # seen in a first update

    @arguments.public("PreviousEpoch")
    @torch.no_grad()
    def update(self, index: torch.Tensor, logits: torch.Tensor) -> None:
        """Write the probabilities softmax(logits) of this epoch.

        Parameters
        ----------
        index
            Which samples these are, (N,), integers from 0 to num_samples - 1, on any device.
        logits
            (N, num_classes), floating, on any device; nothing is differentiated.

        Raises
        ------
        ValueError
            A shape that does not fit, an index out of range, one written before in this epoch, or
            probabilities in place of logits.
        """
        index = self._checked(index)
        expected = (len(index), self.current.shape[1])
        if logits.shape != expected:
            raise ValueError(
                f"PreviousEpoch: logits has shape {tuple(logits.shape)}, expected {expected}"
            )
        self._check_update(index, logits)
        acc = arguments.accumulator(logits)
        probs = logits.softmax(1, dtype=acc).to(self.current)
        ordered = index.sort(stable=True)
        first = ordered.indices[torch.searchsorted(ordered.values, index)]
        # rows of one index are equal: any order of writing
        self.current.index_copy_(0, index, probs.index_select(0, first))
        self.current_written.index_fill_(0, index, True)
        self._own.index_fill_(0, index, True)

    def _check_update(self, index: torch.Tensor, logits: torch.Tensor) -> None:
        """Raise for what is written a second time and, in the first update, for probabilities."""
        if not self.rewrite and (again := self._own.index_select(0, index)).any():
            raise ValueError(
                f"PreviousEpoch: index {index[again][0].item()} is written again, expected end_epoch() "
                "after each epoch; where an epoch holds a sample more than once, PreviousEpoch(..., "
                "rewrite=True)"
            )
        if self._has_logits or logits.shape[0] == 0 or logits.shape[1] == 1:
            return
        if not logits.is_floating_point():
            dtype = str(logits.dtype).removeprefix("torch.")
            raise TypeError(f"PreviousEpoch: logits has dtype {dtype}, expected a floating one")
        # What a script passes it passes from the start, so that later batches need no look, and a row of
        # logits that happens to sum to 1 raises nothing in the middle of training.
        near = max(1e-3, 4 * torch.finfo(logits.dtype).eps)
        wide = logits.double()
        if ((wide.sum(1) - 1).abs() < near).all() and (wide >= 0).all():
            raise ValueError(
                "PreviousEpoch: logits has rows of probabilities, which sum to 1, expected logits: what "
                "goes into the softmax, or probs.log()"
            )
        self._has_logits = True

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> PreviousEpoch:
        """Move the tables and masks, but keep their dtypes."""
        before: dict[str, Any] = dict(self._buffers)
        for name, x in before.items():  # as integers, which ``.half()`` and the like leave alone
            self._buffers[name] = x.view(_INTEGERS.get(x.dtype, x.dtype))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, x in before.items():
                found: Any = self._buffers[name]
                is_cast = found.dtype != _INTEGERS.get(x.dtype, x.dtype)  # ``.type(dtype)``
                self._buffers[name] = x.to(found.device) if is_cast else found.view(x.dtype)
        return self

    @arguments.public("PreviousEpoch")
    @torch.no_grad()
    def lookup(self, index: torch.Tensor) -> torch.Tensor | None:
        """Return the previous epoch's probabilities, (N, num_classes) on the tables' device.

        None in the first epoch, before any has ended.

        Raises
        ------
        ValueError
            An index out of range, or one that the previous epoch did not write.
        """
        if self.epochs == 0:
            return None
        index = self._checked(index)
        missing = ~self.previous_written[index]
        if missing.any():
            raise ValueError(
                f"PreviousEpoch: index {index[missing][0].item()} was not written in the previous "
                "epoch, expected an update() of every sample in each epoch"
            )
        return self.previous[index]

    @torch.no_grad()
    def gather(self) -> None:
        """Give all ranks what any of them wrote in this epoch; without several ranks, nothing.

        Exact: each row comes from one rank, the lowest that wrote it, as the bytes it holds.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        rank, ranks = dist.get_rank(), dist.get_world_size()
        owner = torch.full_like(self.current_written, ranks, dtype=torch.int32)
        owner[self.current_written] = rank
        dist.all_reduce(owner, dist.ReduceOp.MIN)
        self.current.masked_fill_((owner != rank).unsqueeze(1), 0)
        dist.all_reduce(self.current.view(torch.uint8))
        self.current_written.copy_(owner < ranks)

    def end_epoch(self) -> None:
        """Make this epoch the previous one, on all ranks at once, and begin an empty one."""
        self.gather()
        self.previous, self.current = self.current, self.previous
        self.previous_written, self.current_written = self.current_written, self.previous_written
        self.current_written.zero_()
        self._own.zero_()
        self.epochs += 1

    def _checked(self, index: torch.Tensor) -> torch.Tensor:
        """The index where the tables are, all of it in range."""
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"PreviousEpoch: index has dtype {str(index.dtype).removeprefix('torch.')} and "
                f"{index.ndim} dimensions, expected integers in 1 dimension"
            )
        samples = len(self.current)
        index = index.to(torch.int64)
        if len(index):
            least, most = torch.stack(index.aminmax()).tolist()  # a GPU is waited for once
            if least < 0 or most >= samples:
                outside = index[(index < 0) | (index >= samples)][0].item()
                raise ValueError(f"PreviousEpoch: index is {outside}, expected 0 to {samples - 1}")
        return index.to(self.current.device, non_blocking=True).contiguous()

    def get_extra_state(self) -> dict[str, int]:
        return {"epochs": self.epochs}

    def set_extra_state(self, state: Any) -> None:
        self.epochs = state["epochs"]

    def extra_repr(self) -> str:
        samples, classes = self.current.shape
        return f"{samples} samples, {classes} classes, {self.current.dtype}, epoch {self.epochs}"
