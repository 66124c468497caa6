"""AI-KD's modules: the table of the previous epoch, the discriminator, the loss, the ramp."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import in_ranks
from selfkd.nn import AIKDLoss, Discriminator, PreviousEpoch, sigmoid_rampup
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, DistributedSampler

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
    for probs in (
        logits.softmax(1),
        logits.softmax(1).half(),
        F.one_hot(torch.arange(6) % 5).float(),
    ):
        with pytest.raises(
            ValueError, match=r"PreviousEpoch: logits has rows of prob.*probs.log\(\)"
        ):
            table.update(torch.arange(6), probs)
    table.update(torch.arange(6), logits.log_softmax(1))
    one = PreviousEpoch(2, 1)
    one.update(torch.arange(2), torch.ones(2, 1))  # of one class anything may be a logit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_rounded_probabilities_are_noticed(
    classes: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Whose rows sum to 1 as nearly as their dtype can."""
    probs = (3 * torch.randn(128, classes, generator=generator)).softmax(1).to(dtype)
    with pytest.raises(ValueError, match="rows of probabilities"):
        PreviousEpoch(128, classes).update(torch.arange(128), probs)


def test_rows_that_happen_to_sum_to_1_are_logits() -> None:
    """Once a table has seen logits: two logits of one sample may be (0.25, 0.75) in any step."""
    table = PreviousEpoch(3, 2)
    table.update(torch.tensor([0]), torch.tensor([[2.0, -1.0]]))
    table.update(torch.tensor([1]), torch.tensor([[0.25, 0.75]]))
    table.end_epoch()
    table.update(torch.tensor([2]), torch.tensor([[0.5, 0.5]]))


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
    casts = [lambda dtype=dtype: table.type(dtype) for dtype in (torch.float64, torch.int32)]
    for cast in (
        *casts,
        *(table.double, table.half, table.bfloat16, torch.nn.Sequential(table).float),
    ):
        cast()
        assert table.previous.dtype == table.current.dtype == torch.float16
        assert table.previous_written.dtype == torch.bool
        assert torch.equal(table.previous, before)
        assert torch.equal(table.lookup(torch.arange(6)), before)
    assert PreviousEpoch(6, 4).to_empty(device=device).previous.dtype == torch.float16
    with torch.no_grad():
        assert table.share_memory().previous.is_shared()


def hold_one_table(rank: int, folder: Path, dtype: torch.dtype) -> None:
    """What a rank of two writes into its table; the states that it had are left in files."""
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
                torch.save(table.state_dict(), folder / f"middle{rank}.pt")
        torch.save(list(sampler), folder / f"order{epoch}{rank}.pt")
        table.end_epoch()
        torch.save(table.state_dict(), folder / f"end{epoch}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_ranks_hold_one_table(tmp_path: Path, dtype: torch.dtype) -> None:
    """11 samples on 2 ranks: one is repeated, and rank 0's row of it counts."""
    in_ranks(2, hold_one_table, tmp_path, dtype)
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
                expected = noise[index].softmax(0).to(dtype)
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


def test_both_teachers_are_detached(given: dict[str, torch.Tensor], judge: Discriminator) -> None:
    z, t, r, y = given.values()
    r.requires_grad_()
    AIKDLoss(judge)(z, t, r, y)[0].backward()
    assert z.grad is not None
    assert t.grad is None
    assert r.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_class_that_was_never_predicted(
    dtype: torch.dtype, given: dict[str, torch.Tensor], judge: Discriminator
) -> None:
    """Probability 0, as a table in float16 rounds small ones: finite, and the reference's loss."""
    z, t, _, y = given.values()
    r = torch.tensor([[1, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0]] * 3, dtype=dtype)
    criterion = AIKDLoss(judge, pretrained_weight=0.0, adversarial_weight=0.0)
    loss, parts = criterion(z, t, r, y)
    ways: dict[str, Any] = {"temperature": 1.0, "teacher_kind": "probs"}
    expected = selfkd.reference.distill(z, y, r.double(), **ways)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(x, z)[0] for x in (loss, expected))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert parts.pretrained == 0
    assert parts.previous > 0


def test_an_infinite_term_leaves_the_others_apart(judge: Discriminator) -> None:
    """The student excludes what the previous epoch predicted: that part alone is infinite."""
    z = torch.tensor([[-torch.inf, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    t = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    r = torch.tensor([[0.5, 0.5, 0, 0, 0]], dtype=torch.float64)
    parts = AIKDLoss(judge)(z, t, r, torch.tensor([1]))[1]
    assert parts.previous == torch.inf
    assert all(x.isfinite() for x in (parts.ce, parts.pretrained, parts.adversarial))


@pytest.mark.parametrize("wrapped", ["DataParallel", "replica"])
def test_discriminators_under_data_parallel(wrapped: str, generator: torch.Generator) -> None:
    """The student's step reaches the discriminator's parameters in neither; a replica has no parameters."""
    z, t = (torch.randn(6, 5, generator=generator) for _ in range(2))
    z.requires_grad_()
    torch.manual_seed(3)
    judge = Discriminator(5, (8,))
    made = torch.nn.DataParallel(judge) if wrapped == "DataParallel" else replicated(judge)
    losses = [AIKDLoss(x)(z, t, None, torch.arange(6) % 5)[0] for x in (made, judge)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(x, z)[0] for x in losses[1:]]
    losses[0].backward()
    assert torch.equal(z.grad, grads[0])
    assert all(x.grad is None for x in judge.parameters())
    half = AIKDLoss(made).discriminator_loss(z.bfloat16(), t.bfloat16())
    half.backward()
    assert all(x.grad is not None for x in judge.parameters())


def replicated(module: torch.nn.Module) -> torch.nn.Module:
    """A replica as ``DataParallel`` makes it, which it does on GPUs only."""
    replica = module._replicate_for_data_parallel()
    replica._former_parameters = dict(module._parameters)
    for name, x in module._parameters.items():
        setattr(replica, name, None if x is None else x.view_as(x))
    for name, child in module._modules.items():
        setattr(replica, name, None if child is None else replicated(child))
    return replica


def test_float64_logits_under_autocast(
    given: dict[str, torch.Tensor], generator: torch.Generator
) -> None:
    """Autocast leaves float64 as it is, and narrows the weights that it meets."""
    judge = Discriminator(5, (8,))
    expected = AIKDLoss(judge)(*given.values())[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = AIKDLoss(judge)(*given.values())[0]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_what_aikd_refuses(given: dict[str, torch.Tensor], judge: Discriminator) -> None:
    z, t, r, y = given.values()
    one = torch.nn.Parameter(torch.ones(()))
    names = ["pretrained_weight", "previous_weight", "adversarial_weight"]
    names += ["temperature", "previous_temperature"]
    for name in names:
        for value in (-1.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=rf"AIKDLoss: {name} is .*, expected a finite"):
                AIKDLoss(judge, **{name: value})(z, t, r, y)
        with pytest.raises(TypeError, match=f"AIKDLoss: {name} is True, expected a number"):
            AIKDLoss(judge, **{name: True})(z, t, r, y)
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
    for sentence, call in {
        r"AIKDLoss: previous_probs has shape \(3, 5\), expected \(6, 5\)": lambda: criterion(
            z, t, r[:3], y
        ),
        "AIKDLoss: previous_probs has negative values": lambda: criterion(z, t, r.log(), y),
        r"AIKDLoss: pretrained_logits has shape \(6, 3\), expected \(N, 5\)": lambda: (
            criterion.discriminator_loss(z, t[:, :3])
        ),
        "probabilities that sum to 0.5 at position": lambda: criterion(z, t, r / 2, y),
    }.items():
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(TypeError, match="PreviousEpoch: logits has dtype int64, expected a float"):
        table.update(y, F.one_hot(y, 5))
    with torch.inference_mode():
        index, probs = torch.arange(6), r.clone()
        logits = z.detach().clone()
    table.update(index, logits)
    table.end_epoch()
    criterion(z, logits, table.lookup(index), y)[0].backward()
    criterion(z, t, probs, y)[0].backward()
