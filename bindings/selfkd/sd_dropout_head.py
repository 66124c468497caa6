"""SD-Dropout's whole objective on features: a linear layer and its loss, without storing logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import arguments, contract, functions, head_gradient, kernels, operators
from . import head_checks as checks
from .dropout_views import reference as reference_views
from .sd_dropout_kl import reference as reference_kl

_CONTRACT = checks.CONTRACT
_rows = kernels.register_private(f"{checks.OP}_rows")
_views = kernels.kernel("dropout_views")
_views_backward = kernels.kernel("dropout_views_backward")


def _seed(features: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """A new seed for the masks, on the device of the features: nothing waits for it."""
    return torch.randint(
        -(2**63), 2**63 - 1, (), dtype=torch.int64, device=features.device, generator=generator
    )


# ---- the operator ----


def _has_mixed_products(features: torch.Tensor) -> bool:
    """Whether products of halves give float32; PyTorch has none on the CPU."""
    return features.is_cuda and features.dtype in (torch.float16, torch.bfloat16)


def _mixed_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, y, out_dtype=torch.float32)


class _Head:
    """The products of one call. Chunks share the buffer of logits, but where products are mixed."""

    def __init__(
        self,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        size: int,
        kept: torch.Tensor,
    ) -> None:
        self.acc = arguments.accumulator(features)
        self.mixed = _has_mixed_products(features)
        self.weight = weight if self.mixed else weight.to(self.acc)
        self.bias = None if bias is None else bias.to(self.acc)
        rows = 0 if self.mixed else 3 * size
        self.logits = features.new_empty((rows, weight.shape[0]), dtype=self.acc)
        # Gradients become float16 for a product: a power of two makes the most of its range, with
        # room for 64 times the largest weight of a row.
        self.scale: torch.Tensor | None = None
        if self.mixed and features.dtype == torch.float16:
            least = torch.full((1,), 1e-30, dtype=self.acc, device=kept.device)
            largest = torch.cat([kept.to(self.acc).abs(), least]).amax()
            self.scale = torch.exp2(torch.floor(torch.log2(1024 / largest)))

    def views(
        self, features: torch.Tensor, seed: torch.Tensor, p: float, first: int
    ) -> torch.Tensor:
        """The operand of the stacked product, (3 n, K)."""
        x = features if self.mixed else features.to(self.acc)
        stacked: torch.Tensor = _views(x, seed, p, first).flatten(0, 1)
        return stacked

    def make_logits(self, views: torch.Tensor) -> torch.Tensor:
        if self.mixed:
            logits = _mixed_product(views, self.weight.t())
            return logits if self.bias is None else logits.add_(self.bias)
        out = _of(self.logits, slice(0, views.shape[0]))
        if self.bias is None:
            return torch.mm(views, self.weight.t(), out=out)
        return torch.addmm(self.bias, views, self.weight.t(), out=out)

    def narrow(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradients of logits as the operand of a product."""
        if not self.mixed:
            return grad
        return (grad if self.scale is None else grad * self.scale).to(self.weight.dtype)

    def product(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x @ y, of which one is narrowed."""
        found = _mixed_product(x, y) if self.mixed else torch.mm(x, y)
        return found if self.scale is None else found.div_(self.scale)


def _of(x: torch.Tensor, part: slice) -> torch.Tensor:
    """A part of the rows; x itself where that is all, for a view costs as much as a small product."""
    return x if part.stop - part.start == len(x) else x[part]


def _fill(to: torch.Tensor, part: slice, found: torch.Tensor) -> torch.Tensor:
    """What was found of a part; nothing is copied where that is all."""
    if len(found) == len(to):
        return found
    to[part] = found
    return to


def _forward(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    divisor: torch.Tensor | None,
    seed: torch.Tensor,
    p: float,
    temperature: float,
    kl_weight: float,
    forward_weight: float,
    reverse_weight: float,
    detach_target: bool,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    chunk_bytes: int,
    return_logits: bool,
    wanted: int,
) -> tuple[torch.Tensor, ...]:
    """Loss, rows, denominator, logits, and the gradients of the sum of rows that are wanted; the
    others are empty."""
    (N, K), C, acc = features.shape, weight.shape[0], arguments.accumulator(features)
    in_backward = reduction == checks.NONE and wanted != 0
    size = min(max(N, 1), chunk_bytes // (3 * C * acc.itemsize))
    kept = checks.weights_that_count(target, row_weight, ignore_index)
    if row_weight is not None and not row_weight.is_cuda and not in_backward:
        checks.check_weights(kept)
    count = None if kept.is_cuda else int(kept.count_nonzero())  # nothing waits for a GPU
    head = _Head(features, weight, bias, size, kept)
    rows = features.new_empty(N, dtype=acc)
    logits = features.new_empty((N, C) if return_logits else 0)
    grad_features = features.new_empty((N, K) if wanted & checks.FEATURES else 0, dtype=acc)
    grad_weight: torch.Tensor | None = None
    grad_bias: torch.Tensor | None = None
    numbers = [temperature, kl_weight, forward_weight, reverse_weight, detach_target]
    numbers += [label_smoothing, ignore_index, wanted != 0]
    for first in range(0, max(N, 1), size):
        part = slice(first, min(first + size, N))
        n = part.stop - first
        views = head.views(_of(features, part), seed, p, first)
        stacked = head.make_logits(views)
        z, u, v = stacked.view(3, n, C)
        if return_logits:
            logits[part] = z
        w = z if row_weight is None else _of(row_weight, part)
        try:
            found = _rows(z, u, v, _of(target, part), w, row_weight is not None, *numbers)
        except RuntimeError:
            if not target.is_cuda:  # where no kernel raises for a target
                checks.explain_target(target, C, ignore_index)
            raise
        rows = _fill(rows, part, found)
        if wanted & checks.BIAS:
            found = stacked.sum(0)
            grad_bias = found if grad_bias is None else grad_bias.add_(found)
        grad = head.narrow(stacked) if wanted & (checks.FEATURES | checks.WEIGHT) else stacked
        if wanted & checks.FEATURES:
            back = head.product(grad, head.weight).view(3, n, K)
            found = _views_backward(back, _of(grad_features, part), seed, p, first)
            grad_features = _fill(grad_features, part, found)
        if wanted & checks.WEIGHT:
            if count != N:  # 0 times what may be NaN
                views.view(3, n, K).masked_fill_((kept[part] == 0)[None, :, None], 0)
            if grad_weight is None:
                grad_weight = head.product(grad.t(), views)
            elif head.mixed:
                grad_weight += head.product(grad.t(), views)
            else:
                grad_weight.addmm_(grad.t(), views)
    if reduction != checks.MEAN:
        denominator = rows.new_ones(())
    else:
        denominator = kept.sum(dtype=acc) if divisor is None else divisor.clone()
    loss = (rows.sum(dtype=torch.float64) / denominator).to(acc)
    found = [features.new_empty(0, dtype=acc) if x is None else x for x in (grad_weight, grad_bias)]
    return loss, rows, denominator, logits, grad_features, *found


def _run(*values: Any) -> tuple[torch.Tensor, ...]:
    checks.check_once(values)
    device = values[0].device.type
    if not torch.is_autocast_enabled(device):
        return _forward(*values)
    with torch.autocast(device, enabled=False):  # dtypes are as they should be
        return _forward(*values)


_head, _autograd = head_gradient.define(_run)
_reduction = contract.Choice(checks.OP, "reduction", _CONTRACT)
_numbers = operators.Numbers(_CONTRACT, checks.NAMES, {})


# ---- the function ----


def _fused(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *others: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    *numbers, row_weight, reduction, divisor, generator, chunk_bytes, return_logits = others
    code = _reduction(reduction)
    if row_weight is not None:
        arguments.without_gradient(checks.OP, "row_weight", row_weight)
    if arguments.under_autocast(features) and features.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(features.device.type)
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if divisor is not None:
        divisor = arguments.divisor_tensor(checks.OP, divisor, reduction, features)
    call = _head if torch.compiler.is_compiling() else _autograd
    given = (features, weight, bias, target, row_weight, divisor, _seed(features, generator))
    values = (*given, *numbers, code, chunk_bytes, return_logits, 0)
    loss, rows, _, logits, *_ = call(*_numbers(values))
    result = rows if reduction == "none" else loss
    return (result, logits) if return_logits else result


@functions.fused(_fused, _CONTRACT)
def sd_dropout_head(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    p: float = 0.5,
    temperature: float = 3.0,
    kl_weight: float = 1.0,
    forward_weight: float = 1.0,
    reverse_weight: float = 1.0,
    detach_target: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    divisor: float | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_bytes: int = 64 << 20,
    return_logits: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""The whole SD-Dropout objective of a linear layer on pooled features, without storing its logits.

    .. math::
        CE(fc(h), y) + \lambda \, T^2 \, [\, w_f \, KL(p \| q) + w_r \, KL(q \| p) \,], \quad
        p = softmax(fc(m_u \odot h)/T), \; q = softmax(fc(m_v \odot h)/T)

    with two dropout samples :math:`m_u, m_v` of the features. Logits and their gradients exist for a
    chunk of rows at a time; the gradients of features, weight and bias are made in forward.

    Parameters
    ----------
    features
        h, shape (N, K), float16, bfloat16, float32 or float64.
    weight, bias
        Of the layer fc, shapes (C, K) and (C,) or None, in the dtype of the features (under autocast
        all three are cast, as :func:`torch.nn.functional.linear` does). They may be shared with the
        model's classifier.
    target
        Class of each row, shape (N,), int64. Rows of `ignore_index` count in neither term.
    p
        Dropout probability, 0 <= p < 1.
    temperature, forward_weight, reverse_weight, detach_target
        As for :func:`selfkd.sd_dropout_kl`.
    kl_weight
        :math:`\lambda` >= 0. The paper uses 1 alone and 0.1 beside other distillation losses.
    label_smoothing, ignore_index
        As for :func:`torch.nn.functional.cross_entropy`.
    row_weight
        Weight of each row, or a bool mask, shape (N,), float32 (float64 with float64 features) or
        bool. A row of weight 0 is skipped: value 0 and gradient 0, even where its features are NaN.
    reduction
        ``"mean"``: weighted sum over the sum of the weights of the rows that are not ignored;
        ``"sum"``; ``"none"``: one value for each row (its backward makes the logits a second time).
    divisor
        Denominator of ``"mean"`` instead: a positive number or a 0-d tensor.
    generator
        Of the seed of the masks, on the features' device; default: PyTorch's own (the one that
        activation checkpointing restores).
    chunk_bytes
        Room for logits, in bytes: chunks have chunk_bytes // (12 C) rows (24 C for float64), at least
        one. Beside it, a chunk has its views of the features and their gradients (24 K bytes a row in
        float32); the call keeps the gradients of features and weight in float32, which backward
        scales into new tensors. Half types: on the CPU also the weight in float32; on CUDA also the
        chunk's gradients of logits in the half type, and its gradient of the weight.
    return_logits
        Return the logits of the features without dropout too, detached, (N, C), for accuracy: this
        stores them.

    Returns
    -------
    torch.Tensor or (torch.Tensor, torch.Tensor)
        Loss: 0-d (``"none"``: shape (N,)), float32, or float64 for float64 features. And the logits.

    Raises
    ------
    TypeError
        A dtype or device that is not accepted.
    ValueError
        A shape or number that is not accepted; `chunk_bytes` too small for one row; on the CPU also a
        target out of range. On CUDA a target out of range is a device assertion.
    RuntimeError
        In backward with ``create_graph=True``; the sentence names the composition to use instead.

    Notes
    -----
    Source: Lee, Park, Seo, Kang, "Self-Knowledge Distillation via Dropout", arXiv 2208.05642; the
    objective as in the authors' code, models/methods.py: the cross-entropy sees the features without
    dropout. The masks are those of :func:`selfkd.dropout_views` under a seed drawn for each call, so
    ``torch.manual_seed`` repeats them. Logits are float32 (float64 for float64), gradients of features
    and weight add up in it and are rounded to their dtype once, after scaling, so that small ones
    survive in float16. Half types: on CUDA products take halves and give float32, for which the
    gradients of logits are rounded to the half type (in float16 after scaling them by a power of two
    that leaves room for 64 times the largest weight of a row); on the CPU PyTorch has no such
    products, and operands are converted to float32.

    Examples
    --------
    >>> loss = selfkd.sd_dropout_head(features, fc.weight, fc.bias, target, p=0.5, temperature=3.0)
    """
    _reduction(reduction)
    arguments.number_rule(checks.OP, "p", p, "BELOW_ONE")
    for name, x in (("target", target), ("row_weight", row_weight)):
        arguments.expect_shape(checks.OP, name, x, features.shape[:1])
    acc = arguments.accumulator(features)
    wide, weight = features.to(acc), weight.to(acc)
    bias = None if bias is None else bias.to(acc)
    w = checks.weights_that_count(target, row_weight, ignore_index)
    live = w != 0  # what is skipped must not reach the gradients either
    views = reference_views(wide.masked_fill(~live[:, None], 0), _seed(features, generator), p=p)
    logits, u, v = F.linear(views, weight, bias)
    rows = arguments.cross_entropy(logits, target.masked_fill(~live, 0), label_smoothing)
    if not arguments.is_zero(kl_weight):
        rows = rows + kl_weight * reference_kl(
            u,
            v,
            temperature=temperature,
            forward_weight=forward_weight,
            reverse_weight=reverse_weight,
            detach_target=detach_target,
            weight=live,
            reduction="none",
        )
    rows = torch.where(live, w.to(acc) * rows, 0)
    loss = arguments.reduce_rows(rows, w, reduction, divisor)
    if not return_logits:
        return loss
    return loss, F.linear(wide, weight, bias).detach().to(features.dtype)


reference = functions.reference(sd_dropout_head)
