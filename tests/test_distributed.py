"""Losses on sharded classes, and FSDP, in processes on one machine (gloo).

Each rank makes every check and leaves the failures in a file, from which the tests take their results.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
import traceback
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import selfkd
import test_distill
import test_js_divergence
import test_sd_dropout_kl
import torch
import torch.distributed as dist
import wide
from conftest import SEED, in_ranks
from harness import Case
from torch import nn
from torch.distributed.fsdp import fully_shard

WORLDS = (2, 4)
SHARDED = ("u", "v", "logits", "student", "teacher", "second_teacher")
INF, NAN = torch.inf, torch.nan
pytestmark = [
    pytest.mark.skipif(
        bool(harness.SIMT_LIBRARY), reason="of PyTorch on the CPU: run without SELFKD_SIMT_LIBRARY"
    ),
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed"),
]


# ---- a rank's part of a call ----


def sizes_of(classes: int, world: int) -> list[int]:
    """Shards of different sizes: each rank's are more than those of the rank before it."""
    sizes = [max(1, classes * (2 * k + 1) // world**2) for k in range(world - 1)]
    return [*sizes, classes - sum(sizes)]


def shard(x: torch.Tensor) -> torch.Tensor:
    """This rank's classes, a view."""
    return x.split(sizes_of(x.shape[1], dist.get_world_size()), 1)[dist.get_rank()]


def whole(parts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The classes of all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, parts)
    return torch.empty_like(like).copy_(torch.cat(found, 1))


def function_of(op: str) -> Callable[..., Any]:
    """The sharded function, called with the arguments of the contract."""
    function = getattr(selfkd.distributed, f"vocab_parallel_{op}")
    adapter = getattr(importlib.import_module(f"selfkd.{op}"), "by_contract", None)
    return partial(adapter, function) if adapter else function  # type: ignore[no-any-return]


def call_sharded(
    op: str,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Result, the same bits on all ranks and within 1e-6 of the whole's, and the gradients of all ranks."""
    mine = {name: shard(x) if name in SHARDED else x for name, x in tensors.items()}
    live = harness.live_inputs(op, tensors)
    mine |= {name: mine[name].detach().requires_grad_() for name in live}
    result = function_of(op)(**mine, **options)
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, result.detach())
    assert all(torch.equal(x.nan_to_num(7), results[0].nan_to_num(7)) for x in results)
    expected = harness.through_torch(op, tensors, options)[0]
    if result.ndim == 0 and expected.isfinite():
        torch.testing.assert_close(result.detach(), expected, rtol=1e-6, atol=1e-12)
    out = torch.ones_like(result) if grad is None else grad
    grads = torch.autograd.grad(result, [mine[name] for name in live], out)
    for name, x in zip(live, grads, strict=True):
        assert x.stride() == torch.empty_like(mine[name]).stride()
    wholes = {name: whole(x, tensors[name]) for name, x in zip(live, grads, strict=True)}
    return result.detach(), wholes


# ---- the cases of both operators ----

CASES = {
    "sd_dropout_kl": (test_sd_dropout_kl.CASES, test_sd_dropout_kl.IMAGES),
    "distill": (test_distill.CASES, test_distill.IMAGES),
    "js_divergence": (test_js_divergence.CASES, test_js_divergence.MAPS),
}
LAYOUTS = {"images": ["contiguous", "channels_last"], "rows": ["contiguous"]}
FEW = ("imagenet_classes", "two_temperatures", "weights", "weighted", "voc", "mask")


def case_checks(world: int) -> dict[str, Callable[[], None]]:
    """Each case of each operator, and a few of them in more dtypes and layouts; on 4 ranks the few alone."""
    found = {}
    for op, of_kinds in CASES.items():
        for kind, cases in zip(("rows", "images"), of_kinds, strict=True):
            for case in cases:
                few = case.name in FEW
                if case.big or (world > 2 and not few):
                    continue
                both = few and world == 2
                for dtype in ("float32", "bfloat16", "float64") if both else ("float32",):
                    for layout in LAYOUTS[kind] if both else ["contiguous"]:
                        name = f"{op}-{kind}-{case}-{dtype}-{layout}"
                        found[name] = partial(check_case, op, case, dtype, layout, name)
    return found


def check_case(op: str, case: Case, dtype: str, layout: str, name: str) -> None:
    """Against the float64 reference of whole rows, as every back end; a case needs a class for each rank."""
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
    first = next(iter(case.make(generator).values()))
    if first.shape[1] < dist.get_world_size():
        make = case.make
        case = replace(case, make=lambda g: {k: repeated(k, x) for k, x in make(g).items()})
    backend = harness.Backend("sharded", call_sharded)
    harness.check_case(op, case, backend, dtype, layout, generator)


def repeated(name: str, x: torch.Tensor) -> torch.Tensor:
    """More classes of the same kind."""
    return x.repeat(1, 4, *[1] * (x.ndim - 2)) if name in SHARDED else x


# ---- what only shards have ----


def check_excluded_shards() -> None:
    """A rank may hold nothing but -inf, of one side or of both, or NaN: all as in whole rows."""
    g = torch.Generator().manual_seed(SEED)
    sides = [3 * torch.randn(8, 40, generator=g, dtype=torch.float64) for _ in range(2)]
    for x, first in ((sides[0], (1, 2)), (sides[1], (1, 3))):
        for row in first:  # row 1: both; 2: the first side alone; 3: the second alone
            shard(x)[row] = -INF if dist.get_rank() == 1 else shard(x)[row]
    for x in sides:  # every rank writes its own part of its own copy
        x.copy_(whole(shard(x), x))
    sides[0][4, 39] = NAN
    sides[0][5, :] = sides[1][6, :] = -INF
    target = torch.randint(0, 40, (8,), generator=g)
    target[1:4] = 39  # not of rank 1, but where there are two
    target[1:4] -= 39 * (dist.get_world_size() == 2)
    for dtype in (torch.float32, torch.float64):
        u, v = (x.to(dtype) for x in sides)
        for options in (
            {},
            {"forward_weight": 0.0},
            {"reverse_weight": 0.0},
            {"detach_target": True},
        ):
            compare_rows("sd_dropout_kl", {"u": u, "v": v}, options)
        for options in test_js_divergence.KINDS.values():
            compare_rows("js_divergence", {"student": u, "teacher": v}, options)
        for options in ({}, {"teacher_temperature": 2.0}, {"label_smoothing": 0.1}):
            compare_rows("distill", {"logits": u, "target": target, "teacher": v}, options)
        compare_rows("distill", {"logits": u, "target": target}, {})
        compare_rows("distill", {"logits": u, "teacher": v}, {})


def compare_rows(op: str, tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    """All rows, infinite ones too; the gradients of those that are finite."""
    options = {**options, "reduction": "none"}
    case = Case("excluded", lambda g: {}, exact=1e-11)
    expected, expected_grads = harness.reference(op, tensors, options)
    found, grads = call_sharded(op, tensors, options)
    harness.assert_values(found, expected, f"{op} {options}", case)
    finite = expected.isfinite()
    assert finite[0]
    for name, x in expected_grads.items():
        harness.assert_gradient(
            grads[name][finite].to(found.dtype), x[finite], f"{name} {options}", case
        )


def check_tiny_masses() -> None:
    """What rounds to 0 counts all the same: a class of mass 0 that q excludes, a row sure of its class."""
    u, v = torch.zeros(2, 40), torch.zeros(2, 40)
    shard(u)[0] = -1e5 if dist.get_rank() == 1 else 0.0
    shard(v)[0, 0] = -INF if dist.get_rank() == 1 else 0.0
    u, v = whole(shard(u), u), whole(shard(v), v)
    for weights in ({"forward_weight": 0.0}, {"reverse_weight": 0.0}):
        expected = selfkd.sd_dropout_kl(u, v, reduction="none", **weights)
        found, _ = call_sharded("sd_dropout_kl", {"u": u, "v": v}, {"reduction": "none", **weights})
        assert expected[0].isinf() == ("reverse_weight" in weights)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for beta, weights in ((0.0, {"forward_weight": 0.0}), (1.0, {"reverse_weight": 0.0})):
        tensors, options = {"student": u, "teacher": v}, {"beta": beta, "reduction": "none"}
        expected = selfkd.sd_dropout_kl(u, v, temperature=1.0, reduction="none", **weights)
        found, _ = call_sharded("js_divergence", tensors, options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    logits, target = torch.zeros(2, 40), torch.tensor([3, 39])
    logits[torch.arange(2), target] = 60.0
    found, _ = call_sharded("distill", {"logits": logits, "target": target}, {"reduction": "none"})
    assert (found > 0).all()
    torch.testing.assert_close(
        found, selfkd.distill(logits, target, reduction="none"), rtol=1e-6, atol=0
    )


def check_ignored_class() -> None:
    """ignore_index may be a class: it is one of whole rows, not of a shard."""
    g = torch.Generator().manual_seed(SEED)
    logits, teacher = torch.randn(2, 64, 12, generator=g)
    target = torch.randint(0, 12, (64,), generator=g)
    for ignored in (0, 11):
        harness.check_tensors(
            "distill",
            Case("ignored_class", lambda g: {}, {"ignore_index": ignored, "mask_teachers": True}),
            harness.Backend("sharded", call_sharded),
            {"logits": logits, "target": target, "teacher": teacher},
        )


def check_equal_rows() -> None:
    """Rows that agree, or differ by a constant, give exactly 0.

    For js_divergence it must not exceed what float64 finds class by class in rows that far apart.
    """
    u = 100 * torch.randn(9, 100, generator=torch.Generator().manual_seed(SEED))
    for dtype in (torch.float32, torch.float64):
        for v in (u, (u.bfloat16() + 64).to(u.dtype) * 0 + u):
            found, grads = call_sharded("sd_dropout_kl", {"u": u.to(dtype), "v": v.to(dtype)}, {})
            assert found == 0
            assert all((x == 0).all() for x in grads.values())
        z = u.to(dtype).round()
        found, _ = call_sharded("sd_dropout_kl", {"u": z, "v": z + 4096}, {})
        assert found == 0
        for options in test_js_divergence.KINDS.values():
            for shift in (0, 512):
                tensors = {"student": z, "teacher": z + shift}
                found, grads = call_sharded("js_divergence", tensors, options)
                assert found == 0
                assert all((x == 0).all() for x in grads.values())
            found, _ = call_sharded("js_divergence", {**tensors, "teacher": z + 4096}, options)
            assert abs(found) < (1e-12 if options.get("kind") == "tv" else 1e-24)


def check_close_rows() -> None:
    """Shards of rows that nearly agree do not, by what lies between them; the loss keeps all digits."""
    g = torch.Generator().manual_seed(SEED)
    student, noise = 3 * torch.randn(16, 300, generator=g), torch.randn(16, 300, generator=g)
    for options in test_js_divergence.KINDS.values():
        for apart in (1e-6, 1e-3):
            tensors = {"student": student, "teacher": student + apart * noise}
            exact = wide.js_divergence({k: wide.wide(x) for k, x in tensors.items()}, **options)
            found, grads = call_sharded("js_divergence", tensors, {**options, "reduction": "none"})
            error = abs(found.double().numpy() - exact.result) / exact.result
            assert error.max() <= 3e-6, (options, apart)
            for name, x in grads.items():
                error = abs(x.double().numpy() - exact.grads[name]).max(1)
                assert (error <= 1e-5 * abs(exact.grads[name]).max(1)).all(), (options, apart)


def check_parts_of_rows() -> None:
    """Classes are brought to float64 a part at a time, of rows and of positions: results are the same."""
    g = torch.Generator().manual_seed(SEED)
    for shape in ((7, 40), (3, 40, 5, 3)):
        student, teacher = (shard(torch.randn(shape, generator=g)) for _ in range(2))
        weight = torch.rand(student[:, 0].shape, generator=g)

        def call(student: torch.Tensor = student, *rest: torch.Tensor) -> list[torch.Tensor]:
            live = [x.clone().requires_grad_() for x in (student, rest[0])]
            loss = selfkd.distributed.vocab_parallel_js_divergence(*live, weight=rest[1])
            return [loss, *torch.autograd.grad(loss, live)]

        expected = call(student, teacher, weight)
        for most in (1, 100):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("selfkd.distributed.js_divergence._CLASSES", most)
                torch.testing.assert_close(call(student, teacher, weight), expected)


def check_fixed_side() -> None:
    """The side that does not learn has no gradient, and the other the one that it has with it."""
    g = torch.Generator().manual_seed(SEED)
    x, y = (shard(torch.randn(6, 40, generator=g)) for _ in range(2))
    for function in (
        selfkd.distributed.vocab_parallel_sd_dropout_kl,
        partial(selfkd.distributed.vocab_parallel_js_divergence, beta=0.3),
    ):
        live = [z.clone().requires_grad_() for z in (x, y)]
        expected = torch.autograd.grad(function(*live), live)
        for k, pair in enumerate(((live[0], y), (x, live[1]))):
            assert torch.equal(torch.autograd.grad(function(*pair), live[k])[0], expected[k])


def counted(call: Callable[[], Any]) -> tuple[int, int]:
    """How many collectives a call makes, and how many bytes each rank gives."""
    seen: list[int] = []
    plain = dist.all_gather

    def gather(to: list[torch.Tensor], x: torch.Tensor, **named: Any) -> Any:
        seen.append(x.nbytes)
        return plain(to, x, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", gather)
        for name in (
            "all_reduce",
            "all_to_all",
            "broadcast",
            "reduce_scatter",
            "all_gather_object",
        ):
            patch.setattr(dist, name, lambda *x, **named: pytest.fail("another collective"))
        call()
    return len(seen), sum(seen)


def check_communication() -> None:
    """A few scalars a row, in one all-gather or two; a message of constant size where sizes are not given."""
    rows, classes, world = 64, 1000, dist.get_world_size()
    draw = partial(torch.randn, rows, sizes_of(classes, world)[dist.get_rank()])
    u, v = (draw().requires_grad_() for _ in range(2))
    t, s = draw(), draw()
    target = torch.randint(0, classes, (rows,))
    dist.broadcast(target, 0)
    one, two, three = (
        selfkd.distributed.vocab_parallel_sd_dropout_kl,
        selfkd.distributed.vocab_parallel_distill,
        selfkd.distributed.vocab_parallel_js_divergence,
    )
    sizes = {"sizes": sizes_of(classes, world)}
    calls: dict[str, tuple[Callable[[], torch.Tensor], int, int]] = {
        "sd_dropout_kl": (lambda: one(u, v, **sizes), 1, 4),
        "distill, cross-entropy": (lambda: two(u, target, **sizes), 1, 5),
        "distill, a teacher": (lambda: two(u, None, t, **sizes), 1, 4),
        "distill, both": (lambda: two(u, target, t, **sizes), 1, 8),
        "distill, two teachers": (lambda: two(u, target, (t, s), **sizes), 1, 11),
        "js_divergence": (lambda: three(u, v, **sizes), 2, 5),
    }
    for name, (call, gathers, scalars) in calls.items():
        messages, given = counted(lambda call=call: call().backward())  # type: ignore[misc]
        line = f"{name}: {messages} all-gather, {given / rows:g} bytes a row from each of {world} ranks"
        if dist.get_rank() == 0:
            print(f"{line}; a row of logits has {u.shape[1] * u.element_size()}", flush=True)
        assert (messages, given) == (gathers, 8 * scalars * rows)
    assert counted(lambda: one(u, v).backward())[0] == 2


def raises(kind: type[Exception], sentence: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == sentence


def check_sentences() -> None:
    """Every rank says what is wrong, also with another rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    distill = selfkd.distributed.vocab_parallel_distill
    sd_dropout_kl = selfkd.distributed.vocab_parallel_sd_dropout_kl
    js_divergence = selfkd.distributed.vocab_parallel_js_divergence
    x, target = torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)
    live = x.clone().requires_grad_()
    one = torch.nn.Parameter(torch.ones(()))
    for name, call in {
        "vocab_parallel_distill: teachers": lambda: distill(x, target, (None, live)),
        "vocab_parallel_distill: temperature": lambda: distill(x, target, x, temperature=one),
        "vocab_parallel_distill: ce_weight": lambda: distill(x, target, ce_weight=one),
        "vocab_parallel_distill: divisor": lambda: distill(x, target, divisor=one),
        "vocab_parallel_sd_dropout_kl: temperature": lambda: sd_dropout_kl(x, x, temperature=one),
        "vocab_parallel_js_divergence: beta": lambda: js_divergence(x, x, beta=one),
        "vocab_parallel_js_divergence: weight": lambda: js_divergence(x, x, weight=live[:, 0]),
        "vocab_parallel_sd_dropout_kl: weight": lambda: sd_dropout_kl(x, x, weight=live[:, 0]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}.* requires grad"):
            call()
    with pytest.raises(TypeError, match=r"^vocab_parallel_distill: target is a list, expected a"):
        distill(x, [0, 1], x)
    mine = x.double() if rank == 1 else x
    raises(
        TypeError,
        "vocab_parallel_sd_dropout_kl: u has dtype float64 on rank 1, expected float32 like rank 0",
        lambda: sd_dropout_kl(mine, mine),
    )
    more = torch.zeros(6, 3, 2) if rank == 1 else torch.zeros(5, 3, 2)
    raises(
        ValueError,
        "vocab_parallel_distill: logits has rows of shape (6, 2) on rank 1, expected (5, 2) like rank 0",
        lambda: distill(more, None, more),
    )
    raises(
        ValueError,
        f"vocab_parallel_distill: sizes has 1 values, expected one for each rank ({world})",
        lambda: distill(x, target, sizes=[3]),
    )
    raises(
        ValueError,
        f"vocab_parallel_distill: logits has size 3 in dimension C, expected 4 as sizes says of rank {rank}",
        lambda: distill(x, target, sizes=[4] * world),
    )
    target[3] = 3 * world
    raises(
        ValueError,
        f"vocab_parallel_distill: target is {3 * world} at position [3], expected 0 to {3 * world - 1}, or "
        "ignore_index, -100",
        lambda: distill(x, target),
    )
    raises(
        TypeError,
        "vocab_parallel_distill: weight has dtype float64, expected float32 or bool",
        lambda: distill(x, None, x, weight=torch.ones(5, dtype=torch.float64)),
    )
    raises(
        ValueError,
        "sd_dropout_kl: v has size 2 in dimension C, expected 3",
        lambda: sd_dropout_kl(x, x[:, :2]),
    )
    raises(
        ValueError,
        "vocab_parallel_distill: ce_weight is -1, expected a finite number >= 0",
        lambda: distill(x, target, ce_weight=-1.0),
    )
    live = x.clone().requires_grad_()
    loss = sd_dropout_kl(live, torch.randn(5, 3))
    raises(
        RuntimeError,
        "selfkd: sd_dropout_kl_backward of a shard has no derivative; use selfkd.reference on all classes",
        lambda: torch.autograd.grad(loss, live, create_graph=True),
    )


def check_parts_and_groups() -> None:
    """return_parts, and a group that is not the default one."""
    group = dist.new_group()
    g = torch.Generator().manual_seed(SEED)
    logits, teacher = torch.randn(2, 33, 50, generator=g)
    target = torch.randint(0, 50, (33,), generator=g)
    options: dict[str, Any] = {"label_smoothing": 0.1, "return_parts": True, "temperature": 2.0}
    expected = selfkd.distill(logits, target, teacher, **options)
    found = selfkd.distributed.vocab_parallel_distill(
        shard(logits), target, shard(teacher), **options, group=group
    )
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-6, atol=0)


def check_compile() -> None:
    """One graph, collectives included, for several numbers of rows."""
    world, sizes = dist.get_world_size(), sizes_of(40, dist.get_world_size())

    def loss(u: torch.Tensor, v: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        one = selfkd.distributed.vocab_parallel_sd_dropout_kl(1.5 * u, v, sizes=sizes)
        two = selfkd.distributed.vocab_parallel_distill(u, target, 2 * v.detach(), sizes=sizes)
        three = selfkd.distributed.vocab_parallel_js_divergence(u, 2 * v.detach(), sizes=sizes)
        return one + two + three  # type: ignore[operator]

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        g = torch.Generator().manual_seed(world)
        u, v = (shard(torch.randn(rows, 40, generator=g)).requires_grad_() for _ in range(2))
        target = torch.randint(0, 40, (rows,), generator=g)
        expected, found = loss(u, v, target), compiled(u, v, target)
        torch.testing.assert_close(found, expected)
        before = harness.backward_calls("sd_dropout_kl"), harness.backward_calls("distill")
        torch.testing.assert_close(
            torch.autograd.grad(found, (u, v)),
            torch.autograd.grad(expected, (u, v), retain_graph=True),
        )
        after = harness.backward_calls("sd_dropout_kl"), harness.backward_calls("distill")
        assert after == (before[0] + 2, before[1] + 2)
        assert compiled(u, v, target + 40).isnan()  # out of range: no check of values in a graph
        with torch.inference_mode():
            target = target.clone()
        for function in (loss, compiled):
            (grad,) = torch.autograd.grad(function(u, v, target), u)
            torch.testing.assert_close(grad, torch.autograd.grad(expected, u, retain_graph=True)[0])


# ---- FSDP ----


class Student(nn.Module):
    """Two layers and the SD-Dropout head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
        self.head = selfkd.nn.SDDropout(nn.Linear(32, 10))

    def forward(self, x: torch.Tensor, target: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        logits, loss = self.head(self.body(x), target)
        return loss + selfkd.distill(logits, None, teacher)  # type: ignore[no-any-return]


def check_fsdp() -> None:
    """A model of fully sharded parameters has the losses of a whole one, step by step."""
    data = torch.Generator().manual_seed(SEED)
    batch = (
        torch.randn(16, 20, generator=data),
        torch.randint(0, 10, (16,), generator=data),
        torch.randn(16, 10, generator=data),
    )
    curves = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = Student()
        if sharded:
            mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
            for part in (*model.body, model.head, model):
                if any(True for _ in part.parameters()):
                    fully_shard(part, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for k in range(5):
            torch.manual_seed(k)  # the same masks
            loss = model(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=0)


def checks(world: int) -> dict[str, Callable[[], None]]:
    """What the ranks of a world of that size check, by name."""
    found = [
        check_excluded_shards,
        check_tiny_masses,
        check_ignored_class,
        check_equal_rows,
        check_close_rows,
        check_parts_of_rows,
        check_fixed_side,
        check_communication,
    ]
    found += [check_sentences, check_parts_and_groups]
    if world == 2:
        found += [check_compile, check_fsdp]
    return case_checks(world) | {x.__name__.removeprefix("check_"): x for x in found}


# ---- the ranks, and what they found ----


def run_rank(rank: int, folder: Path, world: int) -> None:
    """Make every check, and leave the failures by name."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    failures = {}
    for name, check in checks(world).items():
        try:
            check()
        except BaseException:
            failures[name] = traceback.format_exc()
        agreed: list[Any] = [None] * world
        dist.all_gather_object(agreed, name in failures)
    torch.save(failures, folder / f"failures{rank}.pt")
    dist.destroy_process_group()


@functools.cache
def failures(world: int) -> dict[str, str]:
    """What failed on any of the ranks of a world of that size, which runs once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        importlib.import_module("torch._dynamo")  # once, not in each
        in_ranks(world, run_rank, folder, world)
        found: dict[str, str] = {}
        for rank in range(world):
            for check, text in torch.load(folder / f"failures{rank}.pt").items():
                found[check] = f"{found.get(check, '')}rank {rank}: {text}\n"
        return found


@pytest.mark.long(5)  # side by side, in one process: another would run the ranks again
@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in WORLDS for name in checks(world)]
)
def test_ranks(world: int, name: str) -> None:
    found = failures(world)
    assert name not in found, found[name]
