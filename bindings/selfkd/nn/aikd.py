"""Self-distillation in the manner of AI-KD: a pre-trained model, the previous epoch, a discriminator.

The method section of the paper (AI-KD, arXiv 2211.10938) was not available when this was written, and
no official code is known. This is what its abstract states: the student learns from a pre-trained
model of the same task and from the predictive probabilities of its own previous epoch, and deceives
a discriminator that tells the pre-trained model's predictive distributions from its own. The
adversarial form, the discriminator, all weights, temperatures and schedules are the user's choice;
no number of the paper is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import arguments
from ..adversarial import adversarial
from ..distill import distill

_LEARNS = "call selfkd.reference.distill, which gives it one"
_WEIGHTS = ("pretrained_weight", "previous_weight", "adversarial_weight")
_TEMPERATURES = ("temperature", "previous_temperature")
_INTEGERS = {  # as wide as a table's numbers
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def _former_parameters(judge: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What stands for the parameters in a replica of ``DataParallel``, which has none."""
    return [
        (f"{prefix}.{name}" if prefix else name, x)
        for prefix, module in judge.named_modules()
        for name, x in getattr(module, "_former_parameters", {}).items()
    ]


def _dtype_of(judge: nn.Module) -> torch.dtype | None:
    """Of its first floating parameter. ``judge.parameters()`` takes five times as long."""
    for x in (judge._parameters or getattr(judge, "_former_parameters", {})).values():
        if x is not None and x.is_floating_point():
            return x.dtype
    for module in judge._modules.values():
        if module is not None and (found := _dtype_of(module)):
            return found
    return None


def _in_dtype_of(judge: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Logits in the dtype that a discriminator computes in; autocast sees to it, but not of float64."""
    dtype = _dtype_of(judge)
    if dtype in (None, logits.dtype):
        return logits
    if logits.dtype != torch.float64 and arguments.under_autocast(logits):
        return logits
    return logits.to(dtype)


def _require_sizes(op: str, **sizes: Any) -> None:
    """Raise unless each is a whole number, 1 or more."""
    for name, value in sizes.items():
        if arguments.integer(op, name, value) < 1:
            raise ValueError(f"{op}: {name} is {value}, expected 1 or more")


class Discriminator(nn.Module):
    """Scores predictive distributions: an MLP on softmax(logits / temperature).

    Parameters
    ----------
    num_classes
        C, the width of its input.
    hidden
        Widths of the hidden layers, any number of them.
    activation
        Makes the activation after each hidden layer.
    normalization
        Makes the normalisation before each activation from the layer's width, for example
        ``nn.LayerNorm``; None: none. (Batch normalisation sees both kinds of distributions in the
        discriminator's step and only the student's in the student's.)
    temperature
        T of the softmax, finite and > 0.

    Notes
    -----
    The defaults are ours: the paper's discriminator is not known (see :class:`AIKDLoss`).
    """

    def __init__(
        self,
        num_classes: int,
        hidden: Sequence[int] = (256, 256),
        *,
        activation: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2),
        normalization: Callable[[int], nn.Module] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        _require_sizes("Discriminator", num_classes=num_classes)
        arguments.require("Discriminator", "hidden", hidden, "Sequence[int]")
        _require_sizes("Discriminator", **{f"hidden[{k}]": x for k, x in enumerate(hidden)})
        for name, made in (("activation", activation), ("normalization", normalization)):
            if not callable(made) and (made is not None or name == "activation"):
                raise TypeError(
                    f"Discriminator: {name} is {arguments.described(made)}, expected a function that makes a "
                    "module, such as nn.ReLU"
                )
        way = "leave it to a layer"
        temperature = arguments.in_range(
            "Discriminator", "temperature", temperature, "POSITIVE", way
        )
        self.num_classes, self.temperature = num_classes, temperature
        layers: list[nn.Module] = []
        width = num_classes
        for wide in hidden:
            layers.append(nn.Linear(width, wide))
            if normalization is not None:
                layers.append(normalization(wide))
            layers.append(activation())
            width = wide
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    @arguments.public("Discriminator")
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores (N,) of logits (N, C): high where the pre-trained model is taken for their source."""
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"Discriminator: logits has shape {tuple(logits.shape)}, "
                f"expected (N, {self.num_classes})"
            )
        logits = _in_dtype_of(self, logits)
        if self.temperature != 1:
            logits = logits / self.temperature
        scores: torch.Tensor = self.layers(torch.softmax(logits, 1))
        return scores.squeeze(1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


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
        _require_sizes("PreviousEpoch", num_samples=num_samples, num_classes=num_classes)
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
        self.epochs = 0  # that have ended
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
            least, most = torch.stack(index.aminmax()).tolist()  # which waits for a GPU once
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


class AIKDParts(NamedTuple):
    """The weighted terms of :class:`AIKDLoss`, detached: their sum is the loss.

    `previous` is 0 in the first epoch; if it stays 0, ``PreviousEpoch.end_epoch()`` is not called.
    """

    ce: torch.Tensor
    pretrained: torch.Tensor
    previous: torch.Tensor
    adversarial: torch.Tensor


def _logarithms(probs: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """Of the previous epoch's probabilities: PyTorch's are quicker than those in `distill`, on the CPU."""
    if probs.device.type == "cpu" and not torch.compiler.is_compiling() and (probs < 0).any():
        raise ValueError(
            "AIKDLoss: previous_probs has negative values, expected probabilities: what "
            "PreviousEpoch.lookup() returns, or logits.softmax(1)"
        )
    return probs.to(acc).log()


class AIKDLoss(nn.Module):
    r"""Cross-entropy, both distillations and the deceiving of the discriminator.

    .. math::
        CE(z, y) + w_{pre} T^2 KL(q_T \| p_T) + w_{prev} T_p^2 KL(r_{T_p} \| p_{T_p})
        + w_{adv} A(D(z))

    with p the student's distribution of logits z, q the pre-trained model's, r the previous epoch's,
    and A the generator's :func:`selfkd.adversarial` of the discriminator's scores. q and r are detached
    here: the method learns from both and teaches neither.

    Parameters
    ----------
    discriminator
        Scores (N,) of logits (N, C): a :class:`Discriminator` or any other module, also wrapped in
        ``DistributedDataParallel``. A part of this module; give its parameters an optimizer.
    pretrained_weight, previous_weight, adversarial_weight
        w_pre, w_prev, w_adv, finite and >= 0. Plain attributes, which a schedule may set before any
        epoch: ``criterion.previous_weight = 0.5 * sigmoid_rampup(epoch, 80)``.
    temperature, previous_temperature
        T and T_p, finite and > 0.
    mode
        Form of the game: ``"bce"``, ``"hinge"``, ``"lsgan"`` or ``"wgan"``.
    label_smoothing, ignore_index
        Of the cross-entropy, as for :func:`torch.nn.functional.cross_entropy`.

    Notes
    -----
    This follows the abstract of AI-KD (arXiv 2211.10938), whose method section was not available: the
    form of the game, weights, temperatures and schedules are the user's choice, the defaults are
    ours, and no number of the paper is claimed.

    Examples
    --------
    >>> loss, parts = criterion(logits, pretrained_logits, previous.lookup(index), target)
    >>> loss.backward()  # no gradient reaches the discriminator or the pre-trained model
    >>> student_optimizer.step()
    >>> criterion.discriminator_loss(logits, pretrained_logits).backward()  # none reaches the student
    >>> discriminator_optimizer.step()
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        pretrained_weight: float = 1.0,
        previous_weight: float = 1.0,
        adversarial_weight: float = 0.1,
        temperature: float = 4.0,
        previous_temperature: float = 1.0,
        mode: str = "bce",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if not isinstance(discriminator, nn.Module):
            raise TypeError(
                f"AIKDLoss: discriminator is {arguments.described(discriminator)}, expected a module, such "
                "as selfkd.nn.Discriminator(num_classes)"
            )
        self.discriminator = discriminator
        self.pretrained_weight, self.previous_weight = pretrained_weight, previous_weight
        self.adversarial_weight, self.mode = adversarial_weight, mode
        self.temperature, self.previous_temperature = temperature, previous_temperature
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index

    @arguments.public("AIKDLoss")
    def forward(
        self,
        logits: torch.Tensor,
        pretrained_logits: torch.Tensor,
        previous_probs: torch.Tensor | None,
        target: torch.Tensor,
    ) -> tuple[torch.Tensor, AIKDParts]:
        """Loss of the student's step, and its parts.

        Parameters
        ----------
        logits, pretrained_logits
            Of the student and of the pre-trained model, (N, C). Only `logits` gets a gradient.
        previous_probs
            What :meth:`PreviousEpoch.lookup` gave, (N, C) probabilities; None in epoch 0.
        target
            Class of each row, (N,) int64. `ignore_index` counts in the other terms all the same.
        """
        weights = [self._number(x, "NONNEGATIVE") for x in _WEIGHTS]
        temperatures = [self._number(x, "POSITIVE") for x in _TEMPERATURES]
        teachers = {"pretrained_logits": pretrained_logits, "previous_probs": previous_probs}
        for name, x in teachers.items():
            if isinstance(x, torch.Tensor):
                arguments.expect_shape("AIKDLoss", name, x, logits.shape)
        loss, ce, pretrained = distill(
            logits,
            target,
            pretrained_logits.detach(),
            teacher_weights=weights[0],
            temperature=temperatures[0],
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            return_parts=True,
        )
        parts = [ce, pretrained]
        if previous_probs is not None and weights[1] != 0:
            previous: Any = distill(
                logits,
                teachers=_logarithms(previous_probs.detach(), loss.dtype),
                teacher_weights=weights[1],
                temperature=temperatures[1],
                teacher_temperature=temperatures[1],
                teacher_kind="log_probs",
            )
            loss = loss + previous
            parts.append(previous.detach())
        else:
            parts.append(torch.zeros_like(ce))
        if weights[2] != 0:
            game = adversarial(self._judge(logits), mode=self.mode, side="generator")
            game = weights[2] * game
            loss = loss + game
            parts.append(game.detach())
        else:
            parts.append(torch.zeros_like(ce))
        return loss, AIKDParts(*parts)

    def _number(self, name: str, rule: str) -> Any:
        """An attribute as a number in its range."""
        return arguments.in_range("AIKDLoss", name, getattr(self, name), rule, _LEARNS)

    @arguments.public("AIKDLoss")
    def discriminator_loss(
        self, logits: torch.Tensor, pretrained_logits: torch.Tensor
    ) -> torch.Tensor:
        """Loss of the discriminator's step: no gradient reaches either model.

        Both kinds go through the discriminator as one batch.
        """
        if logits.shape[1:] != pretrained_logits.shape[1:]:
            rest = "".join(f", {x}" for x in logits.shape[1:])
            raise ValueError(
                f"AIKDLoss: pretrained_logits has shape {tuple(pretrained_logits.shape)}, expected "
                f"(N{rest}) like logits"
            )
        both = torch.cat([pretrained_logits.detach(), logits.detach()])
        judge = self.discriminator
        scores = judge(_in_dtype_of(judge, both))
        real, fake = scores.split([len(pretrained_logits), len(logits)])
        return adversarial(real, fake, mode=self.mode)

    def _judge(self, logits: torch.Tensor) -> torch.Tensor:
        """The discriminator's scores, with a gradient to the logits but none to its parameters."""
        judge = self.discriminator
        if isinstance(judge, (DistributedDataParallel, nn.DataParallel)):
            judge = judge.module
        named = list(judge.named_parameters()) or _former_parameters(judge)
        frozen = {name: parameter.detach() for name, parameter in named}
        given = (_in_dtype_of(judge, logits),)
        scores: torch.Tensor = torch.func.functional_call(judge, frozen, given)
        return scores

    def extra_repr(self) -> str:
        names = (*_WEIGHTS, *_TEMPERATURES, "mode")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
