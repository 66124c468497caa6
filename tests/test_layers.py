"""selfkd.layers: what the ``kernels`` package asks of a layer, and the loss of causal language models."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from selfkd import layers
from torch import Tensor

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="of PyTorch on the CPU: run without SELFKD_SIMT_LIBRARY"
)
IGNORED, N, L, V = -100, 3, 7, 33
LOSS = layers.ForCausalLMLoss()


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(x.name, x.kind, x.default) for x in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", layers.__all__)
def test_what_kernels_asks_of_a_layer(name: str) -> None:
    """No constructor, no member but ``forward`` and two flags, the arguments of what it stands for."""
    layer = getattr(layers, name)
    assert layer.__init__ is torch.nn.Module.__init__
    members, of_modules = ({x for x, _ in inspect.getmembers(y)} for y in (layer, torch.nn.Module))
    assert members - of_modules <= {"can_torch_compile", "has_backward"}
    assert layer.can_torch_compile
    if name == "ForCausalLMLoss":
        replaced = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    else:
        replaced = getattr(selfkd, name)
    assert parameters(layer.forward)[1:] == parameters(replaced)


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and labels, of which some do not count."""
    source = torch.Generator().manual_seed(2022)
    logits = (3 * torch.randn(N, L, V, generator=source)).to(dtype).requires_grad_()
    labels = torch.randint(V, (N, L), generator=source)
    labels[0, 3:] = IGNORED
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
def test_for_causal_lm_loss(dtype: torch.dtype, items: Any, shifted: bool) -> None:
    """Beside the formula in float64, with the gradient's error in each row over its largest."""
    logits, labels = batch(dtype)
    given = {"labels": None, "shift_labels": labels} if shifted else {"labels": labels}
    loss = LOSS(logits, vocab_size=V, num_items_in_batch=items, output_attentions=True, **given)
    (grad,) = torch.autograd.grad(loss, logits)

    exact = logits.detach().double().requires_grad_()
    next_label = labels if shifted else torch.cat([labels[:, 1:], labels[:, :1] * 0 + IGNORED], 1)
    total = F.cross_entropy(exact.flatten(0, 1), next_label.flatten(), reduction="sum")
    expected = total / (int(items) if items is not None else (next_label != IGNORED).sum())
    (expected_grad,) = torch.autograd.grad(expected, exact)

    allowed, of_grad = (1e-12, 1e-12) if dtype == torch.float64 else (3e-6, 1e-5)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(loss - expected) <= allowed * expected
    error = (grad.double() - expected_grad).abs() - harness.HALF_ULP[dtype] * expected_grad.abs()
    assert (error <= of_grad * expected_grad.abs().amax(-1, keepdim=True)).all()


def test_for_causal_lm_loss_is_theirs() -> None:
    theirs = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    logits, labels = batch(torch.float32)
    for options in {}, {"num_items_in_batch": 5}, {"ignore_index": 4}, {"shift_labels": labels}:
        kept = labels.clamp(min=0) if "ignore_index" in options else labels
        found, expected = (f(logits, labels=kept, vocab_size=V, **options) for f in (LOSS, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, logits)[0] for x in (found, expected)), rtol=1e-5, atol=1e-8
        )
    nothing = torch.full_like(labels, IGNORED)
    assert LOSS(logits, nothing, V).isnan()
    assert theirs(logits, nothing, V).isnan()


@harness.needs_operators
def test_for_causal_lm_loss_compiled() -> None:
    """In one graph for every number of items, which changes from step to step."""
    torch._dynamo.reset()
    compiled = torch.compile(LOSS, fullgraph=True, backend="aot_eager")
    logits, labels = batch(torch.float32)
    for items in 5, torch.tensor(6), 7, 8:
        found, expected = (f(logits, labels, V, items) for f in (compiled, LOSS))
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(x, logits)[0] for x in (found, expected)))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"vocab_size": V + 1},
            f"ForCausalLMLoss: vocab_size is {V + 1}, expected the last size of logits, whose",
        ),
        (
            {"vocab_size": None},
            "ForCausalLMLoss: vocab_size is None, expected the last size of logits, whose",
        ),
        (
            {"logits": torch.tensor(1.0)},
            f"ForCausalLMLoss: vocab_size is {V}, expected the last size of logits",
        ),
        ({"labels": None}, "ForCausalLMLoss: labels is None, expected them, or shift_labels"),
        ({"labels": 3}, "ForCausalLMLoss: labels is the number 3, expected a tensor or None"),
        ({"logits": None}, "ForCausalLMLoss: logits is None, expected a tensor"),
        (
            {"num_items_in_batch": "a"},
            'ForCausalLMLoss: num_items_in_batch is the string "a", expected a tensor',
        ),
        (
            {"labels": torch.zeros(2, 2).long()},
            f"distill: target has size 4 in dimension N, expected {N * L}",
        ),
        ({"num_items_in_batch": 0}, "distill: divisor is 0, expected a finite number > 0"),
    ],
)
def test_for_causal_lm_loss_says_what_is_wrong(wrong: dict[str, Any], sentence: str) -> None:
    logits, labels = batch(torch.float32)
    with pytest.raises((TypeError, ValueError)) as error:
        LOSS(**{"logits": logits, "labels": labels, "vocab_size": V} | wrong)
    assert str(error.value).startswith(sentence)
