"""AI-KD's modules: the table of the previous epoch, the discriminator, the loss, the ramp."""

from __future__ import annotations

import copy
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
import torch.nn.functional as F
from selfkd.nn import AIKDLoss, Discriminator, PreviousEpoch, sigmoid_rampup
from torch.nn.utils import parametrizations

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)


def kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(1).mean()


def saved_and_loaded(module: torch.nn.Module) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file)
    return state


# ---- PreviousEpoch ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_table_of_a_shuffled_loader(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Three epochs in different orders: each lookup gives the epoch before, exactly as stored."""
    table = PreviousEpoch(10, 4, dtype=dtype)
    logits_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    before = None
    for _ in range(3):
        logits = 3 * torch.randn(10, 4, generator=generator, dtype=logits_dtype)
        for index in torch.randperm(10, generator=generator).split(3):
            found = table.lookup(index)
            if before is None:
                assert found is None
            else:
                assert found is not None
                assert found.dtype == dtype
                assert torch.equal(found, before[index])
            table.update(index, logits[index].requires_grad_())
        before = logits.softmax(1).to(dtype)
        table.end_epoch()
    assert not table.previous.requires_grad
    assert table.epochs == 3


def test_half_precision_logits_are_normalised_in_float32(generator: torch.Generator) -> None:
    table = PreviousEpoch(5, 1000, dtype=torch.float32)
    logits = torch.randn(5, 1000, generator=generator).bfloat16()
    table.update(torch.arange(5), logits)
    assert torch.equal(table.current, logits.float().softmax(1))


def test_what_was_not_written_is_named() -> None:
    table = PreviousEpoch(8, 3)
    table.update(torch.tensor([0, 1, 2, 6]), torch.zeros(4, 3))
    table.end_epoch()
    assert table.lookup(torch.tensor([6, 0])) is not None
    sentence = "index 7 was not written in the previous epoch, expected an update"
    with pytest.raises(ValueError, match=sentence):
        table.lookup(torch.tensor([0, 7, 3]))
    table.end_epoch()  # an epoch that wrote nothing
    with pytest.raises(ValueError, match="index 0 was not written"):
        table.lookup(torch.tensor([0]))


def test_indices_and_shapes_that_do_not_fit() -> None:
    table, logits = PreviousEpoch(8, 3), torch.zeros(2, 3)
    table.update(torch.arange(8), torch.zeros(8, 3))
    table.end_epoch()
    for bad in (8, -1):
        sentence = f"PreviousEpoch: index is {bad}, expected 0 to 7"
        with pytest.raises(ValueError, match=sentence):
            table.update(torch.tensor([0, bad]), logits)
        with pytest.raises(ValueError, match=sentence):
            table.lookup(torch.tensor([bad, 0]))
    with pytest.raises(ValueError, match=r"logits has shape \(3, 3\), expected \(2, 3\)"):
        table.update(torch.tensor([0, 1]), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"logits has shape \(2, 4\), expected \(2, 3\)"):
        table.update(torch.tensor([0, 1]), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="index has dtype float32 and 1 dimensions, expected int"):
        table.update(torch.zeros(2), logits)
    with pytest.raises(ValueError, match="index has dtype bool"):
        table.lookup(torch.ones(8, dtype=torch.bool))
    table.update(torch.tensor([0, 7], dtype=torch.int32), logits)
    table.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3))


def test_an_epoch_that_was_not_ended_is_noticed() -> None:
    """Without end_epoch() lookup() would give None for ever, and AIKDLoss leave out a term unseen."""
    table, logits = PreviousEpoch(4, 3), torch.randn(2, 3)
    table.update(torch.tensor([0, 1]), logits)
    table.update(torch.tensor([3, 3]), logits)  # twice in one batch: the first row counts
    with pytest.raises(ValueError, match=r"index 1 is written again, expected end_epoch\(\) after"):
        table.update(torch.tensor([2, 1]), logits)
    table.end_epoch()
    table.update(torch.tensor([0, 1]), logits)
    resumed = PreviousEpoch(4, 3)
    resumed.load_state_dict(table.state_dict())
    resumed.update(torch.tensor([0, 1]), logits)  # its epoch is run again
    free = PreviousEpoch(4, 3, rewrite=True)
    for _ in range(2):
        free.update(torch.tensor([0, 1]), logits)
    assert torch.equal(free.current[:2], logits.softmax(1).half())


def test_probabilities_are_noticed(generator: torch.Generator) -> None:
    logits = torch.randn(6, 5, generator=generator)
    table = PreviousEpoch(6, 5)
    for probs in (logits.softmax(1), logits.softmax(1).half(), F.one_hot(torch.arange(6) % 5)):
        with pytest.raises(
            ValueError, match=r"PreviousEpoch: logits has rows of prob.*probs.log\(\)"
        ):
            table.update(torch.arange(6), probs)
    table.update(torch.arange(6), logits.log_softmax(1))
    one = PreviousEpoch(2, 1)
    one.update(torch.arange(2), torch.ones(2, 1))  # of one class anything may be a logit


def test_first_row_of_a_repeated_index_counts(generator: torch.Generator) -> None:
    table = PreviousEpoch(3, 4, dtype=torch.float32)
    logits = torch.randn(5, 4, generator=generator)
    table.update(torch.tensor([2, 0, 2, 0, 1]), logits)
    assert torch.equal(table.current, logits.softmax(1)[[1, 4, 0]])


def test_resume_in_the_middle_of_an_epoch(generator: torch.Generator) -> None:
    straight = PreviousEpoch(6, 4)
    logits = torch.randn(2, 6, 4, generator=generator)
    halves = torch.arange(6).split(3)
    straight.update(torch.arange(6), logits[0])
    straight.end_epoch()
    straight.update(halves[0], logits[1, :3])
    resumed = PreviousEpoch(6, 4)
    resumed.load_state_dict(saved_and_loaded(straight))
    for table in (straight, resumed):
        assert torch.equal(table.lookup(torch.arange(6)), logits[0].softmax(1).half())
        table.update(halves[1], logits[1, 3:])
        table.end_epoch()
        assert torch.equal(table.lookup(torch.arange(6)), logits[1].softmax(1).half())
        assert table.epochs == 2
    fresh = PreviousEpoch(6, 4)
    fresh.load_state_dict(saved_and_loaded(PreviousEpoch(6, 4)))
    assert fresh.lookup(halves[0]) is None
    twin = copy.deepcopy(straight)
    twin.end_epoch()
    assert straight.lookup(halves[0]) is not None


def test_to_moves_the_tables_and_casts_nothing() -> None:
    table = PreviousEpoch(6, 4)
    assert sum(x.nbytes for x in table.buffers()) == 2 * 6 * 4 * 2 + 3 * 6
    assert {x.device.type for x in table.to("meta").buffers()} == {"meta"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = PreviousEpoch(6, 4).to(device)
    table.update(torch.arange(6), torch.zeros(6, 4))
    table.end_epoch()
    found = table.lookup(torch.arange(6))
    assert found is not None
    assert found.device.type == device
    assert (found == 0.25).all()
    before = table.previous.clone()
    for cast in (table.double, table.half, table.bfloat16, torch.nn.Sequential(table).float):
        cast()
        assert table.previous.dtype == table.current.dtype == torch.float16
        assert torch.equal(table.previous, before)


RANKS = """
import sys, torch, torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from selfkd.nn import PreviousEpoch
folder, rank, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
table = PreviousEpoch(11, 5, dtype=dtype)
sampler = DistributedSampler(range(11), num_replicas=2, rank=rank, shuffle=True, seed=3)
for epoch in range(2):
    sampler.set_epoch(epoch)
    for step, index in enumerate(DataLoader(range(11), batch_size=2, sampler=sampler)):
        table.lookup(index)
        noise = torch.randn(11, 5, generator=torch.Generator().manual_seed(100 * epoch + rank))
        table.update(index, noise[index])  # what a rank writes differs from rank to rank
        if epoch == 1 and step == 1:
            table.gather()
            torch.save(table.state_dict(), f"{folder}/middle{rank}.pt")
    torch.save(list(sampler), f"{folder}/order{epoch}{rank}.pt")
    table.end_epoch()
    torch.save(table.state_dict(), f"{folder}/end{epoch}{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_ranks_hold_one_table(tmp_path: Path, dtype: str) -> None:
    """11 samples on 2 ranks: one is repeated, and rank 0's row of it counts."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(tmp_path), str(rank), dtype],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for child in children:
        errors = child.communicate(timeout=120)[1]
        assert child.returncode == 0, errors
    for epoch in range(2):
        found = [torch.load(tmp_path / f"end{epoch}{rank}.pt") for rank in range(2)]
        orders = [torch.load(tmp_path / f"order{epoch}{rank}.pt") for rank in range(2)]
        assert set(orders[0]) | set(orders[1]) == set(range(11))
        assert len(set(orders[0]) & set(orders[1])) == 1
        for state in found:
            assert state["previous_written"].all()
            for index in range(11):
                rank = 0 if index in orders[0] else 1
                noise = torch.randn(
                    11, 5, generator=torch.Generator().manual_seed(100 * epoch + rank)
                )
                expected = noise[index].softmax(0).to(getattr(torch, dtype))
                assert torch.equal(state["previous"][index], expected)
    middle = [torch.load(tmp_path / f"middle{rank}.pt") for rank in range(2)]
    assert torch.equal(middle[0]["current"], middle[1]["current"])
    assert middle[0]["current_written"].sum() == 8  # 2 steps of 2 samples on 2 ranks


# ---- Discriminator ----


def test_discriminator_sees_distributions_only(generator: torch.Generator) -> None:
    judge = Discriminator(5, (8, 7), temperature=2.0)
    assert [type(x).__name__ for x in judge.layers] == [
        *["Linear", "LeakyReLU"] * 2,
        "Linear",
    ]
    logits = torch.randn(6, 5, generator=generator)
    scores = judge(logits)
    assert scores.shape == (6,)
    torch.testing.assert_close(scores, judge(logits + 3))
    torch.testing.assert_close(scores, judge.layers(F.softmax(logits / 2, 1)).squeeze(1))
    assert judge(logits[:0]).shape == (0,)
    made = Discriminator(5, [8], activation=torch.nn.SiLU, normalization=torch.nn.LayerNorm)
    assert [type(x).__name__ for x in made.layers] == ["Linear", "LayerNorm", "SiLU", "Linear"]
    assert len(Discriminator(5, ()).layers) == 1
    with pytest.raises(ValueError, match=r"logits has shape \(6, 4\), expected \(N, 5\)"):
        judge(logits[:, :4])
    with pytest.raises(ValueError, match="temperature is 0, expected a finite number > 0"):
        Discriminator(5, temperature=0.0)


# ---- AIKDLoss ----


@pytest.fixture
def given(generator: torch.Generator) -> dict[str, torch.Tensor]:
    def logits() -> torch.Tensor:
        return 2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)

    return {
        "logits": logits().requires_grad_(),
        "pretrained_logits": logits().requires_grad_(),
        "previous_probs": logits().softmax(1),
        "target": torch.tensor([0, 1, 2, 3, 4, 0]),
    }


@pytest.fixture
def judge(generator: torch.Generator) -> Iterator[Discriminator]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield Discriminator(5, (8,)).double()


@pytest.mark.parametrize("mode", ["bce", "hinge", "lsgan", "wgan"])
@pytest.mark.parametrize("first_epoch", [False, True])
def test_loss_is_the_sum_of_its_terms(
    first_epoch: bool, mode: str, given: dict[str, torch.Tensor], judge: Discriminator
) -> None:
    criterion = AIKDLoss(
        judge,
        pretrained_weight=0.7,
        previous_weight=0.4,
        adversarial_weight=0.2,
        temperature=3.0,
        previous_temperature=2.0,
        mode=mode,
        label_smoothing=0.1,
    )
    z, t, r, y = given.values()
    loss, parts = criterion(z, t, None if first_epoch else r, y)
    ce = F.cross_entropy(z, y, label_smoothing=0.1)
    terms = [ce, 0.7 * 9 * kl(F.log_softmax(t.detach() / 3, 1), F.log_softmax(z / 3, 1))]
    softened = F.log_softmax(r.log() / 2, 1)
    previous = 0.4 * 4 * kl(softened, F.log_softmax(z / 2, 1))
    terms.append(torch.zeros_like(ce) if first_epoch else previous)
    terms.append(0.2 * selfkd.reference.adversarial(judge(z), mode=mode, side="generator"))
    torch.testing.assert_close(loss, sum(terms))
    torch.testing.assert_close(tuple(parts), tuple(x.detach() for x in terms))
    torch.testing.assert_close(sum(parts), loss.detach())
    assert not any(x.requires_grad for x in parts)
    expected = torch.autograd.grad(sum(terms), z)[0]
    loss.backward()
    torch.testing.assert_close(z.grad, expected)
    assert t.grad is None
    assert all(x.grad is None for x in judge.parameters())


@pytest.mark.parametrize("mode", ["bce", "hinge", "lsgan", "wgan"])
def test_discriminator_step_reaches_no_model(
    mode: str, given: dict[str, torch.Tensor], judge: Discriminator
) -> None:
    z, t, *_ = given.values()
    loss = AIKDLoss(judge, mode=mode).discriminator_loss(z[:4], t)
    torch.testing.assert_close(
        loss, selfkd.reference.adversarial(judge(t), judge(z[:4]), mode=mode)
    )
    loss.backward()
    assert z.grad is None
    assert t.grad is None
    assert all(x.grad is not None for x in judge.parameters())


def test_weights_may_change_between_epochs(
    given: dict[str, torch.Tensor], judge: Discriminator
) -> None:
    criterion = AIKDLoss(judge)
    for weight in (1.0, sigmoid_rampup(3, 10), 0.0):
        criterion.pretrained_weight = criterion.previous_weight = weight
        criterion.adversarial_weight = weight
        parts = criterion(*given.values())[1]
        expected = AIKDLoss(
            judge, pretrained_weight=weight, previous_weight=weight, adversarial_weight=weight
        )(*given.values())[1]
        torch.testing.assert_close(parts, expected)
    assert parts.pretrained == parts.previous == 0
    assert parts.adversarial == 0


def test_discriminator_learns_and_is_deceived(generator: torch.Generator) -> None:
    """The game itself: the discriminator tells two distributions apart; the student closes the gap."""
    torch.manual_seed(0)
    judge, student = Discriminator(5, (32,)), torch.zeros(64, 5, requires_grad=True)
    teacher = 3 * F.one_hot(torch.arange(64) % 5, 5).float()
    criterion = AIKDLoss(judge)
    optimizer = torch.optim.Adam(judge.parameters(), lr=3e-2)
    first = criterion.discriminator_loss(student, teacher).item()
    for _ in range(100):
        optimizer.zero_grad()
        criterion.discriminator_loss(student, teacher).backward()
        optimizer.step()
    assert criterion.discriminator_loss(student, teacher) < 0.1 < first

    def game() -> torch.Tensor:
        return selfkd.adversarial(criterion._judge(student), side="generator")

    start = game().item()
    deceiver = torch.optim.Adam([student], lr=1e-1)
    for _ in range(100):
        deceiver.zero_grad()
        game().backward()
        deceiver.step()
    assert game() < 0.1 * start


# ---- schedules ----


def test_sigmoid_rampup() -> None:
    assert sigmoid_rampup(0, 10) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(5, 10) == pytest.approx(math.exp(-1.25))
    assert [sigmoid_rampup(x, 10) for x in (10, 11, 100)] == [1, 1, 1]
    assert sigmoid_rampup(-3, 10) == sigmoid_rampup(0, 10)
    assert sigmoid_rampup(0, 0) == 1
    values = [sigmoid_rampup(x / 4, 10) for x in range(41)]
    assert values == sorted(values)


# ---- discriminators of other kinds, dtypes, and wrong things ----


def spectral(norm: Callable[..., Any]) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Softmax(1),
        norm(torch.nn.Linear(5, 8)),
        torch.nn.ReLU(),
        norm(torch.nn.Linear(8, 1)),
    )


JUDGES: dict[str, Callable[[], torch.nn.Module]] = {
    "spectral norm": lambda: spectral(parametrizations.spectral_norm),
    "weight norm": lambda: spectral(parametrizations.weight_norm),
    "old spectral norm": lambda: spectral(torch.nn.utils.spectral_norm),
}


@pytest.mark.parametrize("name", JUDGES)
def test_normed_discriminators(name: str, generator: torch.Generator) -> None:
    """The student's gradient is that through the norm; the discriminator's parameters get none."""
    z, t = (torch.randn(6, 5, generator=generator) for _ in range(2))
    z.requires_grad_()
    torch.manual_seed(3)
    judge = JUDGES[name]().eval()  # no power iteration, so that two calls agree
    y = torch.arange(6) % 5
    criterion = copy.deepcopy(AIKDLoss(judge, adversarial_weight=0.5))
    without = AIKDLoss(judge, adversarial_weight=0.0)
    with_game, plain = (
        torch.autograd.grad(c(z, t, None, y)[0], z)[0] for c in (criterion, without)
    )
    game = selfkd.reference.adversarial(judge(z), side="generator")
    torch.testing.assert_close(with_game - plain, 0.5 * torch.autograd.grad(game, z)[0])
    criterion.train()
    criterion(z, t, None, y)[0].backward()
    assert all(x.grad is None for x in criterion.parameters())
    criterion.discriminator_loss(z, t).backward()
    assert all(x.grad is not None for x in criterion.parameters())
    twin = AIKDLoss(JUDGES[name](), adversarial_weight=0.5)
    twin.load_state_dict(saved_and_loaded(criterion))
    if name != "old spectral norm":  # whose module PyTorch cannot copy once it was called
        averaged = torch.optim.swa_utils.AveragedModel(criterion)
        averaged.update_parameters(criterion)
        averaged(z, t, None, y)
    for one, other in zip(twin.state_dict().values(), criterion.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_outside_of_autocast(dtype: torch.dtype, generator: torch.Generator) -> None:
    """The discriminator is float32 and sees float32."""
    z, t = (torch.randn(6, 5, generator=generator).to(dtype) for _ in range(2))
    y = torch.arange(6) % 5
    judge = Discriminator(5, (8,))
    for made in (judge, spectral(lambda x: x)):
        criterion = AIKDLoss(made)
        wide = criterion.discriminator_loss(z.float(), t.float())
        assert torch.equal(criterion.discriminator_loss(z, t), wide)
        torch.testing.assert_close(
            criterion(z, t, None, y)[0], criterion(z.float(), t.float(), None, y)[0]
        )
        criterion.to(dtype)
        criterion.discriminator_loss(z.float(), t.float()).backward()
    assert judge.to(dtype)(z).dtype == dtype


def test_what_aikd_refuses(given: dict[str, torch.Tensor], judge: Discriminator) -> None:
    z, t, r, y = given.values()
    one = torch.nn.Parameter(torch.ones(()))
    for name in ("pretrained_weight", "previous_weight", "temperature", "previous_temperature"):
        with pytest.raises(ValueError, match=f"AIKDLoss: {name} requires grad"):
            AIKDLoss(judge, **{name: one})(z, t, r, y)
        AIKDLoss(judge, **{name: np.float32(0.5)})(z, t, r, y)
        AIKDLoss(judge, **{name: torch.tensor(0.5)})(z, t, r, y)
    criterion, table = AIKDLoss(judge), PreviousEpoch(6, 5)
    for sentence, call in {
        "AIKDLoss: logits is a list, expected a tensor": lambda: criterion([1], t, r, y),
        "AIKDLoss: pretrained_logits is None, expected a": lambda: criterion(z, None, r, y),
        "AIKDLoss: previous_probs is a NumPy array": lambda: criterion(z, t, np.ones(3), y),
        "AIKDLoss: target is the string": lambda: criterion(z, t, r, "y"),
        "AIKDLoss: logits is None": lambda: criterion.discriminator_loss(None, t),
        "Discriminator: logits is a list": lambda: judge([1.0]),
        "PreviousEpoch: index is a list, expected a tensor": lambda: table.update([0], z),
        "PreviousEpoch: logits is None": lambda: table.update(y, None),
    }.items():
        with pytest.raises(TypeError, match=sentence):
            call()
    with torch.inference_mode():
        index, probs = torch.arange(6), r.clone()
        logits = z.detach().clone()
    table.update(index, logits)
    table.end_epoch()
    criterion(z, logits, table.lookup(index), y)[0].backward()
    criterion(z, t, probs, y)[0].backward()
