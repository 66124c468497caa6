"""What callers hand over: for every argument of every public function a result or one sentence.

The tables come from the functions' annotations and the contracts; a new operator is in them by its sample.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
from selfkd import arguments, check_torch
from selfkd.check_torch import contract_of, draw, stored
from torch import Tensor

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="of PyTorch's functions: run without SELFKD_SIMT_LIBRARY"
)
OPS = selfkd.contract.modules()
each_operator = pytest.mark.parametrize("op", OPS)


# ---- a call of each function with all its arguments by name ----


def by_contract(op: str, n: int) -> dict[str, Any]:
    """Every tensor argument of a function, where its arguments are those of the contract."""
    z, w = partial(torch.randn, n, 5), partial(torch.rand, n)
    draws: dict[str, Callable[[], Tensor]] = {
        **dict.fromkeys(("FLOATING", "SAME", "CONSTANT", "TEACHER"), z),
        "INDEX": lambda: torch.randint(5, (n,)),
        "CLASSES": lambda: harness.listed_classes((n, 5), 5),
        "SEED": lambda: torch.tensor(7),
        "WEIGHT": w,
        "ACC": lambda: torch.tensor(3.0),  # a divisor
    }
    found = {x.name: draws[x.rule]() for x in contract_of(op).items if x.is_input}
    for item in contract_of(op).items:
        if item.rule == "CONSTANT" and item.shape == "NK*":  # log-probabilities
            found[item.name] = found[item.name].log_softmax(1)
        if item.rule == "CONSTANT" and item.shape == "N*":  # one number for each row
            found[item.name] = found[item.name][:, 0]
    return found


def given(op: str, n: int = 4) -> dict[str, Any]:
    """Every tensor argument of a function, by the names of the public function."""
    maps = (torch.randn(n, 3, 4, 4), torch.randn(n, 3, 2, 2), torch.randn(n, 3, 8, 8))
    if op == "attention":
        return {"student": maps[0], "teacher": torch.randn(n, 6, 4, 4)}
    if op == "bifpn_fuse":
        return {"inputs": maps, "weight": torch.rand(3), "resize": (None, "nearest", "maxpool")}
    found = by_contract(op, n)
    if op == "distill":
        found["teachers"] = (found.pop("teacher"), found.pop("second_teacher"))
    if op == "sd_dropout_head":
        found |= {"weight": torch.randn(5, 5), "bias": torch.randn(5)}
        del found["seed"]  # which the function draws
    return found


def call(op: str, named: dict[str, Any], space: Any = selfkd) -> Any:
    """The function with arguments by name."""
    named = dict(named)
    inputs = named.pop("inputs", ())
    torch.manual_seed(1)  # masks
    if not isinstance(inputs, (tuple, list)):
        inputs = (inputs, inputs)
    return getattr(space, op)(*inputs, **named)


def parameters(op: str) -> dict[str, str]:
    """The arguments of a public function and their annotations."""
    signature = inspect.signature(getattr(selfkd, op))
    return {name: x.annotation for name, x in signature.parameters.items()}


def numbers(op: str) -> list[str]:
    """Arguments that are numbers, alone or one for each teacher."""
    return [name for name, kind in parameters(op).items() if kind.startswith("float")]


def pairs(of: Callable[[str], Any]) -> list[tuple[str, str]]:
    return [(op, name) for op in OPS for name in of(op)]


def test_every_function_is_here() -> None:
    for op in OPS:
        named = given(op)
        tensors = {name for name, kind in parameters(op).items() if "Tensor" in kind}
        assert set(named) - {"resize"} == tensors, op
        assert call(op, named).isfinite().all(), op
        for space in (selfkd, selfkd.reference):  # annotations are what sentences are made of
            for parameter in inspect.signature(getattr(space, op)).parameters.values():
                for part in arguments._alternatives(parameter.annotation):
                    assert part in arguments._WORDS or arguments._element(part), part


# ---- a number ----

LEARNED = [(op, name) for op, name in pairs(numbers) if name != "divisor"]


@pytest.mark.parametrize(("op", "name"), LEARNED)
@pytest.mark.parametrize(
    "make",
    [
        np.float32,
        np.float64,
        lambda x: torch.tensor(x, dtype=torch.float64),
        lambda x: torch.tensor([x]),
        lambda x: torch.nn.Parameter(torch.tensor(x), requires_grad=False),
    ],
    ids=["numpy32", "numpy64", "0-d", "one_element", "frozen_parameter"],
)
def test_numbers_of_other_libraries(op: str, name: str, make: Callable[[float], Any]) -> None:
    """The same bits as with the Python number."""
    named = {**given(op), name: make(0.25)}
    torch.testing.assert_close(call(op, named), call(op, {**named, name: 0.25}), rtol=0, atol=0)


@pytest.mark.parametrize(("op", "name"), LEARNED)
@pytest.mark.parametrize("live", [False, True], ids=["fixed_inputs", "live_inputs"])
def test_a_number_that_learns(op: str, name: str, live: bool) -> None:
    """A sentence that names the reference, whose gradient it then has; nothing under no_grad."""
    named = given(op)
    if live:
        first = next(iter(named))
        named[first] = (
            named[first].requires_grad_()
            if isinstance(named[first], Tensor)
            else tuple(x.requires_grad_() for x in named[first])
        )
    learned = torch.nn.Parameter(torch.tensor(0.25))
    with pytest.raises(
        ValueError, match=rf"^{op}: {name}.* requires grad, .*selfkd.reference.{op}"
    ):
        call(op, {**named, name: learned})
    with torch.no_grad():
        found = call(op, {**named, name: learned})
    result = call(op, {**named, name: learned}, selfkd.reference)
    torch.testing.assert_close(found, result.detach(), rtol=1e-5, atol=1e-6)
    if (op, name) in CONSTANT:
        return
    (grad,) = torch.autograd.grad(result.double().sum(), learned)
    step = 1e-2
    values = [
        float(call(op, {**named, name: 0.25 + sign * step}, selfkd.reference).double().sum())
        for sign in (1, -1)
    ]
    assert float(grad) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=1e-4)


CONSTANT = {  # of which the result's derivative is 0, or nothing to speak of
    ("attention", "eps"),
    ("bifpn_fuse", "eps"),
    ("dropout_views", "p"),
    ("sd_dropout_head", "p"),
}


@pytest.mark.parametrize(
    ("op", "name"), [("distill", "teacher_weights"), ("distill", "temperature")]
)
def test_one_number_of_two_that_learns(op: str, name: str) -> None:
    learned = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(ValueError, match=rf"^distill: {name}\[1\] requires grad"):
        call(op, {**given(op), name: (1.0, learned)})


TRUE = {"True": True, "np": np.True_, "0-d": torch.tensor(True)}


@pytest.mark.parametrize(
    ("op", "name", "kind"),
    [
        (*pair, kind)
        for pair in pairs(numbers)
        for kind in TRUE
        if (pair[1], kind) != ("divisor", "0-d")  # which may have any dtype
    ],
)
def test_true_is_no_number(op: str, name: str, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"^{op}: {name} is .*, expected a number"):
        call(op, {**given(op), name: TRUE[kind]})


# ---- a tensor that asks for a gradient ----


def fixed(op: str) -> list[str]:
    """Floating tensors that never get a gradient."""
    live = {x.removeprefix("grad_") for x in learning(op)}
    return [
        name
        for name, x in given(op).items()
        if name not in live
        and all(isinstance(y, Tensor) and y.is_floating_point() for y in flat(x))
    ]


def learning(op: str) -> list[str]:
    """The arguments that get gradients."""
    return ["inputs", "weight"] if op == "bifpn_fuse" else check_torch.learning(op, contract_of(op))


def flat(x: Any) -> list[Any]:
    return list(x) if isinstance(x, (tuple, list)) else [x]


def attached(x: Any) -> Any:
    """The tensor, or the last of several, asking for a gradient."""
    *first, last = flat(x)
    found = (*first, last.clone().requires_grad_())
    return found if isinstance(x, tuple) else found[0]


@pytest.mark.parametrize(("op", "name"), pairs(fixed))
def test_a_gradient_is_given_or_refused(op: str, name: str) -> None:
    named = given(op)
    named[name] = attached(named[name])
    with pytest.raises(ValueError, match=rf"^{op}: {name}.* requires grad, .* detach it"):
        call(op, named)
    with torch.no_grad():
        expected = call(op, named)
    if op == "sd_dropout_head" and name == "row_weight":
        named[name] = named[name].detach()
    result = call(op, named, selfkd.reference)
    torch.testing.assert_close(result.detach(), expected, rtol=1e-5, atol=1e-6)
    learned = flat(named[name])[-1]
    if learned.requires_grad:
        (grad,) = torch.autograd.grad(result.sum(), learned)
        assert grad.abs().sum() > 0
        direction, step = torch.randn(learned.shape), 1e-2
        values = []
        for sign in (1, -1):
            *first, last = flat(named[name])
            moved = (*first, last.detach() + sign * step * direction)
            other = {**named, name: moved if isinstance(named[name], tuple) else moved[0]}
            values.append(float(call(op, other, selfkd.reference).detach().double().sum()))
        slope = (values[0] - values[1]) / (2 * step)
        assert float((grad * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=2e-3)


NEVER = [
    (op, item.name)
    for op in OPS
    if op in selfkd.contract.operators()
    for item in contract_of(op).items
    if item.rule in ("WEIGHT", "ACC", "CONSTANT", "TEACHER") and item.is_input
    if item.name not in learning(op)
]


@pytest.mark.parametrize(("op", "name"), NEVER)
@harness.needs_operators
def test_a_gradient_is_refused_by_the_operator(op: str, name: str) -> None:
    """Also for those who call torch.ops.selfkd, and while the compiler traces."""
    of = contract_of(op)
    drawn = stored(of, draw(op, of), torch.float32)
    for learns in (name, of.first):
        drawn[learns].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{op}: {name} requires grad"):
        getattr(torch.ops.selfkd, op)(*harness.schema_values(op, drawn))


# ---- tensors made under torch.inference_mode() ----


def everything_but(
    op: str, keep: str, change: Callable[[Tensor], Tensor], n: int = 4
) -> dict[str, Any]:
    """The arguments, all tensors but the first one to learn changed."""
    named = given(op, n)
    for name, x in named.items():
        if isinstance(x, Tensor) and name != keep:
            named[name] = change(x)
    if "teachers" in named:
        named["teachers"] = tuple(map(change, named["teachers"]))
    if keep == "inputs":
        first, *rest = named[keep]
        named[keep] = (first, *map(change, rest))
    return named


def of_inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def gradient(op: str, named: dict[str, Any], function: Callable[..., Any]) -> list[Tensor]:
    """Result and gradient of the first input that learns."""
    keep = learning(op)[0]
    first = flat(named[keep])[0].detach().requires_grad_()
    x = (first, *named[keep][1:]) if keep == "inputs" else first
    result = function(op, {**named, keep: x})
    return [result.detach(), *torch.autograd.grad(result.sum(), first)]


@each_operator
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inference_tensors(op: str, reduction: str) -> None:
    """The same bits as of ordinary tensors; of a teacher nothing is copied."""
    torch.manual_seed(3)
    named = everything_but(op, learning(op)[0], of_inference)
    if "reduction" in parameters(op):
        named |= {"reduction": reduction}
        if reduction == "none":
            named.pop("divisor", None)
    found = gradient(op, named, call)
    ordinary = {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}
    for several in {"teachers", "inputs"} & set(ordinary):
        ordinary[several] = tuple(x.clone() for x in named[several])
    for x, y in zip(found, gradient(op, ordinary, call), strict=True):
        assert torch.equal(x, y)


def test_of_an_inference_teacher_nothing_is_copied() -> None:
    z, t = torch.randn(4, 5).requires_grad_(), of_inference(torch.randn(4, 5))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.append(x.data_ptr()), x)[1], lambda x: x
    ):
        selfkd.distill(z, teachers=t).backward()
    assert t.data_ptr() in kept
    assert z.grad is not None


@pytest.mark.parametrize("dynamic", [None, True, False])
@each_operator
def test_inference_tensors_compiled(op: str, dynamic: bool | None) -> None:
    """PyTorch's compiler keeps such inputs from 2.13 on; its own losses cannot have them at all."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("of a compiler that can keep inputs without a version: run under PyTorch 2.13")
    torch._dynamo.reset()
    compiled = torch.compile(call_without_seed, fullgraph=True, dynamic=dynamic)
    with torch._functorch.config.patch(enable_autograd_cache=False):  # whose graph others traced
        for n in (4, 6):
            named = everything_but(op, learning(op)[0], of_inference, n)
            results = []
            for function in (call_without_seed, compiled):
                torch.manual_seed(1)
                results.append(gradient(op, named, function))
            for x, y in zip(*results, strict=True):
                torch.testing.assert_close(x, y)


# ---- numbers that change from call to call of compiled code ----


@pytest.mark.parametrize(("op", "name"), pairs(numbers))
def test_no_stale_number_in_compiled_code(op: str, name: str) -> None:
    """PyTorch's compiler keeps an early value of a number that also enters arithmetic of tensors
    (pytorch/pytorch#197889), from the third value on."""
    named = given(op)
    keep = next(iter(named))

    def loss(s: float) -> Tensor:
        x = named[keep]
        x = tuple(y * s for y in x) if isinstance(x, tuple) else x * s
        changed = {**named, keep: x, name: 0.3 * s + 0.01}
        return call_without_seed(op, changed)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for s in (1.0, 1.5, 2.0, 2.5, 3.0):
        torch.manual_seed(1)
        expected = loss(s)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(s), expected)


def call_without_seed(op: str, named: dict[str, Any]) -> Tensor:
    named = dict(named)
    return getattr(selfkd, op)(*named.pop("inputs", ()), **named)


def test_a_divisor_is_not_compiled_again() -> None:
    """A count of tokens differs in every step."""
    z, t = torch.randn(4, 5), torch.randn(4, 5)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda n: selfkd.distill(z, teachers=t, divisor=n), fullgraph=True)
    for n in range(5, 25):
        torch.testing.assert_close(compiled(n / 2), selfkd.distill(z, teachers=t, divisor=n / 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("make", [np.float64, torch.tensor], ids=["numpy", "tensor"])
def test_numbers_of_other_libraries_compiled(make: Callable[[float], Any]) -> None:
    z, t = torch.randn(4, 5), torch.randn(4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: selfkd.distill(z, teachers=t, temperature=s))
    for s in (1.0, 2.0, 3.0):
        torch.testing.assert_close(compiled(make(s)), selfkd.distill(z, teachers=t, temperature=s))


# ---- absent teachers ----


def test_no_teacher() -> None:
    z, y = torch.randn(4, 5), torch.randint(5, (4,))
    t = torch.randn(4, 5)
    for space in (selfkd, selfkd.reference):
        for none in (None, (), [], (None,), (None, None)):
            assert torch.equal(space.distill(z, y, none), space.distill(z, y))
        two = {"teacher_weights": (float("nan"), 0.3), "temperature": (-1.0, 2.0)}
        one = {"teacher_weights": 0.3, "temperature": 2.0}
        kinds = {"teacher_kind": ("what", "logits"), "teacher_temperature": (0, None)}
        found = space.distill(z, y, (None, t), **two, **kinds)
        torch.testing.assert_close(found, space.distill(z, y, t, **one))
        found = space.distill(z, y, [t, None], teacher_weights=[0.3, -1.0], temperature=[2.0, 0])
        torch.testing.assert_close(found, space.distill(z, y, t, **one))
        with pytest.raises(ValueError, match="distill: neither target nor teachers is given"):
            space.distill(z, None, (None, None))
        with pytest.raises(ValueError, match=r"distill: teachers\[1\] has size 4"):
            selfkd.distill(z, y, (None, t[:, :4]))


# ---- wrong things in the place of every argument ----

WRONG: dict[str, Any] = {
    "None": None,
    "list": [1.0, 2.0],
    "nested": [[1.0]],
    "tuple": ("a", "b"),
    "dict": {"a": 1},
    "str": "x",
    "array": np.ones((4, 5), dtype=np.float32),
    "array_0d": np.array(0.5),
    "int": 3,
    "negative": -2,
    "float": 0.5,
    "nan": float("nan"),
    "complex": 1j,
    "True": True,
    "module": torch.nn.Linear(2, 2),
    "function": len,
    "object": object(),
    "0-d": torch.tensor(0.5),
    "1-d": torch.rand(7),
    "3-d": torch.rand(4, 5, 2),
    "9-d": torch.rand([1] * 9),
    "empty": torch.rand(0),
    "integers": torch.ones(4, 5, dtype=torch.int32),
    "flags": torch.ones(4, 5, dtype=torch.bool),
    "complex_tensor": torch.ones(4, 5, dtype=torch.complex64),
    "float64": torch.rand(4, 5, dtype=torch.float64),
    "meta": torch.rand(4, 5, device="meta"),
    "sparse": torch.eye(5)[:4].to_sparse(),
}
IS_TENSOR = [name for name, x in WRONG.items() if isinstance(x, Tensor)]


@pytest.mark.parametrize("live", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize(("op", "name"), pairs(lambda op: list(parameters(op))))
def test_a_result_or_a_sentence(op: str, name: str, what: str, live: bool) -> None:
    named = given(op)
    if live:
        keep = learning(op)[0]
        named[keep] = attached(named[keep])
    for space in (selfkd, selfkd.reference):
        if space is selfkd.reference and what in IS_TENSOR:
            continue  # it takes more shapes and dtypes
        try:
            found = call(op, {**named, name: WRONG[what]}, space)
        except (TypeError, ValueError) as error:
            sentence = str(error)
            assert re.match(rf"{op}: .* expected ", sentence), sentence
            # Of a tensor or a dimension that is accepted, the others may be found to differ.
            of_its_kind = what in IS_TENSOR or isinstance(WRONG[what], int)
            about = "" if of_its_kind or name == "inputs" else name
            assert about in sentence, sentence
            assert "\n" not in sentence, sentence
        else:
            assert all(isinstance(x, Tensor) for x in flat(found))


# ---- sentences that name what to write instead ----

Z, T, Y = torch.randn(4, 6), torch.randn(4, 6), torch.randint(6, (4,))
MAPS, LABELS = torch.randn(2, 6, 3, 3), torch.randint(6, (2, 3, 3))
TOKENS = torch.randn(2, 7, 6)
INSTEAD: list[tuple[str, Callable[[], Any]]] = [
    (r"target.argmax\(1\)", lambda: selfkd.distill(Z, Y.float())),
    (r"target.argmax\(dim\)", lambda: selfkd.distill(Z, Z.softmax(1))),
    (r"target.squeeze\(1\)", lambda: selfkd.distill(MAPS, LABELS[:, None])),
    (r"target.squeeze\(1\)", lambda: selfkd.distill(Z, Y[:, None])),
    (r"weight.squeeze\(1\)", lambda: selfkd.sd_dropout_kl(Z, T, weight=torch.ones(4, 1))),
    (r"target.long\(\)", lambda: selfkd.distill(Z, Y.int())),
    (r"dim=-1", lambda: selfkd.distill(TOKENS, torch.zeros(2, 7, dtype=torch.long))),
    (r"dim=-1", lambda: selfkd.sd_dropout_kl(TOKENS, TOKENS, weight=torch.ones(2, 7))),
    (r"weight.bool\(\) for a mask", lambda: selfkd.distill(Z, Y, T, weight=torch.ones(4).int())),
    (r"weights of classes: F.cross_entropy", lambda: selfkd.distill(Z, Y, weight=torch.ones(6))),
    (r"v.to\(torch.float32\)", lambda: selfkd.sd_dropout_kl(Z, T.half())),
    (r"teachers\[0\].detach\(\)", lambda: selfkd.distill(Z, Y, T.clone().requires_grad_())),
    (r"torch.from_numpy\(x\)", lambda: selfkd.distill(Z, Y, T.numpy())),
    (r"torch.from_numpy\(x\)", lambda: selfkd.simreg(Z, T.numpy())),
]


@pytest.mark.parametrize(("fix", "wrong"), INSTEAD)
def test_a_sentence_names_the_fix(fix: str, wrong: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^\w+: .* expected .*{fix}"):
        wrong()
