"""selfkd.integrations.trl: values, gradients and trainings of trl's own functions."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from selfkd.integrations import trl
from test_integrations import assert_equal, assert_same, draw, learned
from torch import Tensor

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
SHAPE = (3, 5, 12)
BETAS = [0.0, 0.1, 0.5, 1.0]
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="needs trl: `make compat COMPAT=trl`"
)


def terms(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """What each class adds to the divergence of p, the student's, and q, the teacher's."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return q * (log_q - log_p)
    if beta == 1:
        return p * (log_p - log_q)
    log_m = ((1 - beta) * p + beta * q).log()
    return beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)


def jsd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: Any = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Any = None,
) -> Tensor:
    """GKD's loss, written out."""
    values = terms(*(F.log_softmax(x / temperature, -1) for x in (student, teacher)), beta)
    counted = len(values)
    if labels is not None:
        values = values[labels != -100]
        counted = max(len(values), 1)
    if num_items_in_batch is not None:
        return values.sum() / num_items_in_batch
    total = values.sum()
    return {
        "batchmean": total / counted,
        "sum": total,
        "mean": values.mean(),
        "none": values,
    }[reduction]


def with_tail(log_probs: Tensor) -> Tensor:
    rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True))
    return torch.cat([log_probs, rest], -1)


def top(student: Tensor, teacher: Tensor, k: int, alpha: float, tail: bool) -> Tensor:
    """The divergence over the student's top k, written out."""
    indices = student.topk(k, dim=-1).indices
    both = [F.log_softmax(x, -1).gather(-1, indices) for x in (student, teacher)]
    both = [with_tail(x) if tail else F.log_softmax(x, -1) for x in both]
    return terms(*both, alpha).sum(-1)


def labels_of(generator: torch.Generator, hidden: float = 0.4) -> Tensor:
    counts = torch.rand(SHAPE[:-1], generator=generator) >= hidden
    return torch.where(counts, 7, -100)


def test_signatures() -> None:
    """The names and defaults of trl 1.16."""
    parameters = inspect.signature(trl.generalized_jsd_loss).parameters
    assert {name: x.default for name, x in parameters.items()} == {
        "student_logits": inspect.Parameter.empty,
        "teacher_logits": inspect.Parameter.empty,
        "labels": None,
        "beta": 0.5,
        "temperature": 1.0,
        "reduction": "batchmean",
        "num_items_in_batch": None,
    }
    expected = ["student_log_probs", "teacher_log_probs", "alpha"]
    assert list(inspect.signature(trl.compute_divergence).parameters) == expected


@needs_trl
@pytest.mark.parametrize("name", trl.__all__)
def test_signatures_are_those_of_trl(name: str) -> None:
    ours, theirs = (inspect.signature(x).parameters for x in (getattr(trl, name), of_trl(name)))
    assert [(x.name, x.kind, x.default) for x in ours.values()] == [
        (x.name, x.kind, x.default) for x in theirs.values()
    ]


def of_trl(name: str) -> Callable[..., Tensor]:
    """trl's own function; that of SDPO is the same file as that of SDFT."""
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.sdft import loss_utils

    return GKDTrainer.generalized_jsd_loss if "jsd" in name else getattr(loss_utils, name)


DEFINITIONS = [False, pytest.param(True, marks=needs_trl)]


@pytest.mark.parametrize("trls", DEFINITIONS, ids=["definition", "trl"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("labelled", [False, True])
def test_jsd_values(
    labelled: bool, reduction: str, beta: float, trls: bool, generator: torch.Generator
) -> None:
    inputs = draw(generator, *SHAPE)
    labels = labels_of(generator) if labelled else None
    theirs = of_trl("generalized_jsd_loss") if trls else jsd
    for number in (None, 7, torch.tensor(7)):
        given = (labels, beta, 2.0, reduction, number)
        assert_same(
            lambda s, t, given=given: trl.generalized_jsd_loss(s, t, *given),
            lambda s, t, given=given: theirs(s, t, *given),
            inputs,
        )


def test_jsd_learns_its_temperature(generator: torch.Generator) -> None:
    for reduction in ("batchmean", "none"):
        assert_same(
            lambda s, t, T, r=reduction: trl.generalized_jsd_loss(s, t, None, 0.3, T, r),
            lambda s, t, T, r=reduction: jsd(s, t, None, 0.3, T, r),
            (*draw(generator, *SHAPE), learned(2.0)),
        )


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_jsd_of_a_batch_without_answers(reduction: str, generator: torch.Generator) -> None:
    """Completions that were cut off leave 0, and gradients of 0; what is masked may be nan."""
    student, teacher = draw(generator, *SHAPE)
    labels = torch.full(SHAPE[:-1], -100)
    with torch.no_grad():
        teacher[0, 0, 0] = torch.nan
    loss = trl.generalized_jsd_loss(student, teacher.detach(), labels, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("alpha", BETAS)
def test_divergence_of_log_probabilities(alpha: float, generator: torch.Generator) -> None:
    """Values for any number of leading dimensions; gradients as they reach the logits."""
    inputs = draw(generator, *SHAPE)

    def both(divergence: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda s, t: divergence(F.log_softmax(s, -1), F.log_softmax(t, -1), alpha)

    assert_same(both(trl.compute_divergence), both(lambda *x: terms(*x).sum(-1)), inputs)
    row = [x.detach()[0, 0].log_softmax(-1) for x in inputs]
    one = trl.compute_divergence(*row, alpha)
    assert one.shape == ()
    torch.testing.assert_close(one, terms(*row, alpha).sum(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", BETAS)
def test_full_logits(alpha: float, generator: torch.Generator) -> None:
    assert_same(
        partial(trl.compute_full_logit_self_distillation_loss, distillation_alpha=alpha),
        lambda s, t: terms(F.log_softmax(s, -1), F.log_softmax(t, -1), alpha).sum(-1),
        draw(generator, *SHAPE),
    )


@pytest.mark.parametrize("alpha", BETAS)
@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("tail", [False, True])
def test_topk_logits(tail: bool, k: int, alpha: float, generator: torch.Generator) -> None:
    student, teacher = draw(generator, *SHAPE)
    inputs = (student.detach() / 3).requires_grad_(), (teacher.detach() / 3).requires_grad_()
    options = {"distillation_topk": k, "distillation_alpha": alpha, "distillation_add_tail": tail}
    assert_same(
        partial(trl.compute_topk_self_distillation_loss, **options),
        lambda s, t: top(s, t, k, alpha, tail),
        inputs,
    )


@harness.needs_operators
def test_compiles_in_one_graph(generator: torch.Generator) -> None:
    """Whether the teacher learns or not."""
    labels, options = labels_of(generator), {"distillation_topk": 4, "distillation_alpha": 0.3}

    def loss(z: Tensor, t: Tensor) -> Tensor:
        of_all = trl.compute_full_logit_self_distillation_loss(z, t, distillation_alpha=0.3)
        of_top = trl.compute_topk_self_distillation_loss(
            z, t, **options, distillation_add_tail=True
        )
        return trl.generalized_jsd_loss(z, t, labels) + (of_all + of_top).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    student, teacher = draw(generator, *SHAPE)
    for t in (teacher, teacher.detach()):
        assert_equal(compiled(student, t), loss(student, t), (student, teacher))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_sides_that_hardly_differ(beta: float, generator: torch.Generator) -> None:
    """In float32, logits 1e-3 apart: ours is the divergence, and the lines of trl lose its digits."""
    student = (3 * torch.randn(64, 1000, generator=generator)).requires_grad_()
    teacher = student.detach() + 1e-3 * torch.randn(student.shape, generator=generator)
    exact = jsd(student.detach().double(), teacher.double(), beta=beta)
    ours = trl.generalized_jsd_loss(student, teacher, beta=beta)
    torch.testing.assert_close(ours.double(), exact, rtol=3e-6, atol=0, check_dtype=False)
    plain = jsd(student, teacher, beta=beta).double()
    assert abs(plain / exact - 1) > 1e-4


# ---- trl's trainers ----

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", *map(str, range(40))]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} "
    "{% if message.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
STEPS, ACCUMULATED = 12, 2


def counting(generator: torch.Generator) -> list[tuple[str, str]]:
    """Beginnings and ends of sentences that count up in steps of their own."""
    rows = []
    for _ in range(64):
        start, step, cut = (
            int(torch.randint(*range_, (), generator=generator))
            for range_ in ((0, 10), (1, 4), (2, 5))
        )
        words = [str(start + step * k) for k in range(8)]
        rows.append((" ".join(words[:cut]), " ".join(words[cut:])))
    return rows


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    found = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    found.chat_template = TEMPLATE
    return found


def llama(width: int, deviation: float) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "max_position_embeddings": 64}
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, **layers, initializer_range=deviation))


def curve(trainer: type, config: type, folder: Path, given: dict[str, Any], **options: Any) -> Any:
    """Losses of all batches of a training by one of trl's trainers."""
    from datasets import Dataset

    losses: list[float] = []

    class Recorded(trainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    common = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": ACCUMULATED}
    common |= {"max_steps": STEPS, "learning_rate": 3e-3, "gradient_checkpointing": False}
    common |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    args = config(str(folder), disable_tqdm=True, **common, **options)
    rows = Dataset.from_list(given.pop("rows"))
    Recorded(args=args, train_dataset=rows, processing_class=tokenizer(), **given).train()
    return losses


def gkd_curve(loss: Any, lmbda: float, beta: float, folder: Path) -> list[float]:
    from transformers import set_seed
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Trainer(GKDTrainer):
        generalized_jsd_loss = staticmethod(loss or GKDTrainer.generalized_jsd_loss)

    set_seed(0)
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in counting(torch.Generator().manual_seed(1))
    ]
    given = {"rows": rows, "teacher_model": llama(32, 0.4), "model": llama(16, 0.1)}
    options = {"lmbda": lmbda, "beta": beta, "max_new_tokens": 6, "max_length": 32}
    return curve(Trainer, GKDConfig, folder, given, **options)


def sdft_curve(mode: str, tail: bool, alpha: float, folder: Path) -> list[float]:
    """The teacher is the student, which has read the answer."""
    from transformers import set_seed
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    set_seed(0)
    rows = [
        {"prompt": a, "privileged_context": b}
        for a, b in counting(torch.Generator().manual_seed(1))
    ]
    options = {"distillation_mode": mode, "distillation_add_tail": tail, "distillation_topk": 8}
    options |= {"distillation_alpha": alpha, "max_completion_length": 6, "num_generations": 1}
    options |= {"teacher_model_kind": "live"}
    options |= {"teacher_prompt_template": "{prompt} {privileged_context}"}
    return curve(
        SDFTTrainer, SDFTConfig, folder, {"rows": rows, "model": llama(16, 0.3)}, **options
    )


def assert_one_curve(ours: list[float], theirs: list[float], other: list[float]) -> None:
    """Ours is theirs, and not the one of another beta."""
    assert len(ours) == len(theirs) == len(other) == STEPS * ACCUMULATED
    apart = [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    assert max(apart) < 1e-4
    assert abs(ours[0] / other[0] - 1) > 1e-2


@needs_trl
@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["off-policy", "on-policy"])
def test_gkd_training(lmbda: float, tmp_path: Path) -> None:
    calls = []

    def counted(*args: Any, **named: Any) -> Tensor:
        calls.append(named)
        return trl.generalized_jsd_loss(*args, **named)

    ours = gkd_curve(counted, lmbda, 0.3, tmp_path)
    assert len(calls) == STEPS * ACCUMULATED
    assert_one_curve(
        ours, gkd_curve(None, lmbda, 0.3, tmp_path), gkd_curve(None, lmbda, 1.0, tmp_path)
    )


@needs_trl
@pytest.mark.parametrize(
    ("mode", "tail"), [("full_logits", False), ("topk_logits", False), ("topk_logits", True)]
)
def test_sdft_training(
    mode: str, tail: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.experimental.sdft import sdft_trainer

    name = f"compute_{mode.replace('_logits', '').replace('full', 'full_logit')}_self_distillation_loss"
    calls = []

    def counted(*args: Any, **named: Any) -> Tensor:
        calls.append(named)
        return getattr(trl, name)(*args, **named)

    theirs, other = (sdft_curve(mode, tail, alpha, tmp_path) for alpha in (0.3, 1.0))
    monkeypatch.setattr(sdft_trainer, name, counted)
    assert_one_curve(sdft_curve(mode, tail, 0.3, tmp_path), theirs, other)
    assert len(calls) == STEPS * ACCUMULATED
