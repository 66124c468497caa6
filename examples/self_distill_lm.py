"""Self-distillation of a language model: it learns from itself once it has read the answer.

A small transformer of bytes first learns to continue code of Python's standard library, and to copy from
a hint in front of it. Then it meets another text, the language reference that help() shows: the teacher
is the network as it is now, given the answer in its prompt, the student the same network without it. The
loss is their generalised Jensen-Shannon divergence on the bytes of the answer, of all 256, or of the 16
that the teacher finds likeliest and one class for the others. No label of the new text is used. All runs
start from one network and differ only in the function that computes the loss.

    student = network(prompt + answer),  teacher = network(answer + prompt + answer)
    loss = weight * [beta KL(teacher||M) + (1-beta) KL(student||M)],  M = beta teacher + (1-beta) student

Sources: "Self-Distillation Enables Continual Learning", arXiv 2601.19897; GKD, arXiv 2306.13649.

    python examples/self_distill_lm.py                      both, a table, and a picture in runs/
    python examples/self_distill_lm.py --divergence topk    of the teacher's 16 likeliest bytes
    python examples/self_distill_lm.py --impl eager         with trl's lines
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import pydoc_data.topics
import sys
from collections.abc import Callable
from importlib import import_module

import common
import selfkd
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

BETA, TOP_K = 0.5, 16
CLASSES, SEPARATOR = 256, 0
PROMPT, ANSWER, BATCH = 24, 16, 32
BEFORE = 200  # steps at least: sides that hardly differ leave the plain formula too few digits to compare
MODULES = ("argparse", "asyncio.events", "datetime", "decimal", "inspect", "pathlib", "typing")


class Texts:
    """Bytes: code of the standard library; the language reference, a tenth of which is held out."""

    def __init__(self, device: str) -> None:
        code = "".join(inspect.getsource(import_module(name)) for name in MODULES)
        topics = "".join(pydoc_data.topics.topics.values())
        known, new = (torch.tensor(list(x.encode()), device=device) for x in (code, topics))
        cut = len(new) * 9 // 10
        self.known, self.new, self.held_out = known, new[:cut], new[cut:]

    @staticmethod
    def passages(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` random passages (count, PROMPT + ANSWER)."""
        length = PROMPT + ANSWER
        starts = torch.randint(len(text) - length, (count, 1), generator=generator)
        return text[starts.to(text.device) + torch.arange(length, device=text.device)]

    @torch.no_grad()
    def accuracy(self, network: nn.Module) -> float:
        """Return the share of bytes of held-out answers that are the network's first choice."""
        passages = self.passages(self.held_out, 256, torch.Generator().manual_seed(1))
        found = answers(network.eval(), passages).argmax(-1)
        return (found == passages[:, PROMPT:]).float().mean().item()


class Block(nn.Module):
    """Attention to what came before, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Network(nn.Module):
    """A causal transformer of bytes: (B, L) to logits (B, L, 256) of the byte that follows."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.bytes = nn.Embedding(CLASSES, width)
        self.places = nn.Embedding(PROMPT + 2 * ANSWER + 1, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, tokens: Tensor, last: int) -> Tensor:
        """Logits of the `last` places; places are counted from the end, where both prompts agree."""
        places = torch.arange(tokens.shape[1], device=tokens.device).flip(0)
        hidden = self.blocks(self.bytes(tokens) + self.places(places))
        return self.head(hidden[:, -last:])


def answers(network: nn.Module, passages: Tensor, hint: bool = False) -> Tensor:
    """Return the logits (B, ANSWER, 256) of the answers, which a hint holds in front of the prompt."""
    tokens = F.pad(passages[:, :-1], (1, 0), value=SEPARATOR)
    if hint:
        tokens = torch.cat([passages[:, PROMPT:], tokens], 1)
    return network(tokens, ANSWER)


def pretrained(texts: Texts, steps: int) -> Network:
    """Return a network that has read code, with a hint and without one."""
    torch.manual_seed(0)
    network = Network().to(texts.known.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in track(range(steps), description="before   "):
        passages = texts.passages(texts.known, BATCH, generator)
        loss = sum(
            F.cross_entropy(answers(network, passages, hint).transpose(1, 2), passages[:, PROMPT:])
            for hint in (False, True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def eager(student: Tensor, teacher: Tensor, *, beta: float, dim: int) -> Tensor:
    """The loss in the lines of trl."""
    log_p, log_q = F.log_softmax(student, dim), F.log_softmax(teacher, dim)
    return eager_of_log_probs(log_p, log_q, beta)


def eager_of_log_probs(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    weights = torch.tensor([1 - beta, beta], device=log_p.device).log()
    mixture = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), 0)
    of_q, of_p = (F.kl_div(mixture, x, reduction="sum", log_target=True) for x in (log_q, log_p))
    return (beta * of_q + (1 - beta) * of_p) / log_p[..., 0].numel()


def eager_topk(
    student: Tensor, indices: Tensor, stored: Tensor, *, beta: float, dim: int
) -> Tensor:
    """The same of the listed classes and a tail."""

    def with_tail(log_probs: Tensor) -> Tensor:
        known = log_probs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
        return torch.cat([log_probs, (-torch.expm1(known)).log()], -1)

    listed = F.log_softmax(student, dim).gather(dim, indices)
    return eager_of_log_probs(with_tail(listed), with_tail(stored), beta)


IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "fused": {"full": selfkd.js_divergence, "topk": selfkd.topk_divergence},
    "reference": {
        "full": selfkd.reference.js_divergence,
        "topk": selfkd.reference.topk_divergence,
    },
    "eager": {"full": eager, "topk": eager_topk},
}


def train(
    impl: str,
    *,
    texts: Texts,
    start: Network,
    divergence: str = "full",
    weight: float = 1.0,
    steps: int = 400,
    seed: int = 0,
    device: str = "cpu",
) -> common.Run:
    """Teach the new text to the network that starts, with one implementation of the loss."""
    teacher, network = start.eval(), copy.deepcopy(start)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss_of, run = common.TimedLoss(IMPLEMENTATIONS[impl][divergence]), common.Run(impl)
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), description=f"{impl:<9}"):
        passages = texts.passages(texts.new, BATCH, generator)
        with torch.no_grad():
            taught = (answers(teacher, passages, hint=True),)
            if divergence == "topk":  # as a teacher is stored
                stored = taught[0].log_softmax(-1).topk(TOP_K, dim=-1)
                taught = (stored.indices, stored.values)
        loss = weight * loss_of(answers(network, passages), *taught, beta=BETA, dim=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
    run.accuracy, run.seconds = texts.accuracy(network), loss_of.seconds
    return run


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says, report, return the exit code."""

    def more(parser: argparse.ArgumentParser) -> None:
        choices = ("full", "topk")
        parser.add_argument("--divergence", choices=choices, default="full", help="default: full")

    options = common.parse(argv, __doc__, weight=1.0, impls=("eager",), more=more)
    torch.set_num_threads(options.threads)
    texts = Texts(options.device)
    network = pretrained(texts, max(BEFORE, options.steps))
    print(f"before: held-out accuracy {texts.accuracy(network):.2%}")
    each = functools.partial(train, texts=texts, start=network, divergence=options.divergence)
    return common.report("Self-distilled LM", common.train_all(each, options), options.out)


if __name__ == "__main__":
    sys.exit(main())
