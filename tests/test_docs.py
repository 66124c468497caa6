"""The documentation: every operator has its page, and what the pages show runs and is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import selfkd
import torch
import torch.nn.functional as F
from pages import DOCS, blocks, load
from pages import OPERATORS as PAGES
from selfkd import contract

pictures = load("pictures")
HEADINGS = [
    "Formula",
    "Shapes and dtypes",
    "What it replaces",
    "How it is computed",
    "Measured",
    "Limits",
    "The contract",
]
OTHER_MASKS = ("sd_dropout_head", "dropout_views")  # their masks are not those of F.dropout
SEED = 7


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def diffs() -> list[Any]:
    """Each diff of the operators' pages, with the Python above it."""
    found = []
    for name, path in PAGES.items():
        setup = ""
        for language, text in blocks(path):
            if language == "python":
                setup += text
            elif language == "diff":
                found.append(pytest.param(name, setup, text, id=f"{name}-{len(found)}"))
    return found


def version(diff: str, sign: str) -> str:
    """The lines before ("-") or after ("+") a change."""
    lines = [line for line in diff.splitlines() if line[:1] in ("", " ", sign)]
    return "\n".join(line[1:] for line in lines)


def one_pair_of_masks(patch: pytest.MonkeyPatch) -> None:
    """Let F.dropout give the samples of one seed in turn, and let every seed be that one."""
    samples: list[torch.Tensor] = []

    def dropout(x: torch.Tensor) -> torch.Tensor:
        if not samples:
            _, *both = selfkd.reference.dropout_views(x, torch.tensor(SEED), p=0.5)
            samples.extend(both)
        return samples.pop(0)

    patch.setattr(F, "dropout", dropout)
    patch.setattr(torch, "randint", lambda *_, **__: torch.tensor(SEED))


def trained(name: str, setup: str, text: str) -> dict[str, torch.Tensor]:
    """What a version leaves behind: losses, parameters and their gradients."""
    torch.manual_seed(SEED)
    names: dict[str, Any] = {"__name__": name}
    exec(setup, names)
    with pytest.MonkeyPatch.context() as patch:
        if name in OTHER_MASKS:
            one_pair_of_masks(patch)
        exec(text, names)
    left = {key: x for key, x in names.items() if key.endswith("loss")}
    for key, module in names.items():
        if isinstance(module, torch.nn.Module):
            for part, x in module.named_parameters():
                left[f"{key}.{part}"] = x
                if x.grad is not None:
                    left[f"{key}.{part}.grad"] = x.grad
    return left


@pytest.mark.parametrize(("name", "setup", "diff"), diffs())
def test_before_is_after(name: str, setup: str, diff: str) -> None:
    before, after = (trained(name, setup, version(diff, sign)) for sign in "-+")
    assert f"selfkd.{name}(" not in version(diff, "-")
    assert f"selfkd.{name}(" in version(diff, "+")
    assert "loss" in before
    assert any(key.endswith(".grad") for key in before)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", contract.modules())
def test_every_operator_has_its_page(name: str) -> None:
    assert name in PAGES, f"docs/operators/{name}.md is missing"
    text = PAGES[name].read_text()
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == HEADINGS
    assert f"Reference: `selfkd.{name}`" in text
    assert (
        f"\n[ops/{name}.h](../../ops/{name}.h)\n" in text
    )  # a line of its own: Sphinx shows the file
    assert re.search(
        rf"^<!-- results: {name} -->\n(.*\n)*?<!-- end results -->$", text, re.MULTILINE
    )
    assert name in [block.values[0] for block in diffs()]
    assert f"](pictures/{name}.svg)" in text


def bytes_kept(name: str, accumulator: int) -> dict[str, int]:
    """Bytes of the results of forward that backward is given, for each row or what else has some."""
    given = {item.name for item in contract.contract(f"{name}_backward").items}
    kept: Counter[str] = Counter()
    for item in contract.contract(name).outputs:
        planes, each = re.fullmatch(r"(\d*)(.*)", item.shape).groups()
        if item.name in given and each in ("N*", "N"):
            of = "sample" if each == "N" else "position" if name == "attention" else "row"
            kept[of] += int(planes or 1) * (8 if item.rule == "F64" else accumulator)
    return dict(kept)


@pytest.mark.parametrize("name", sorted(set(contract.modules()) & set(contract.operators())))
def test_bytes_kept_for_backward(name: str) -> None:
    """What a page says is kept is what the contract says."""
    text = PAGES[name].read_text()
    said = text[text.index("**Kept for backward.**") :].partition("**Nothing cancels.**")[0]
    found = {of: int(count) for count, of in re.findall(r"(\d+) bytes a (\w+)", said)}
    assert found == bytes_kept(name, 4)
    assert found or "Nothing but" in said
    wide = {int(count) for count in re.findall(r"(\d+) bytes with float64", said)}
    assert wide == set(bytes_kept(name, 8).values()) - set(found.values())


def test_pictures_are_those_of_the_kernels() -> None:
    """They are drawn anew by `make results`."""
    drawn = pictures.regenerate()
    assert set(drawn) == set(pictures.FOLDER.glob("*.svg"))
    for path, picture in drawn.items():
        assert path.read_text() == picture, path.name


def test_every_page_is_an_operators() -> None:
    assert set(PAGES) - {"index"} == set(contract.modules())


# ---- choosing a loss ----


def situations() -> dict[str, Any]:
    """The names that docs/choosing.md uses."""
    torch.manual_seed(SEED)
    fc = torch.nn.Linear(6, 5)
    z, t, s, r, u, v = torch.randn(6, 8, 5)
    y, y_other = torch.randint(5, (2, 8))
    pixels, taught = torch.randn(2, 2, 5, 3, 3)
    labels = torch.randint(5, (2, 3, 3))
    labels[0, 0] = 255
    tokens, heard = torch.randn(2, 2, 7, 5)
    targets = torch.randint(5, (2, 7))
    targets[:, -1] = -100
    maps, teacher_maps = torch.randn(2, 2, 4, 3, 3)
    x, features = torch.randn(2, 8, 6)
    real, fake = torch.randn(2, 8)
    class_weights, learned = torch.rand(5), torch.nn.Parameter(torch.tensor(2.0))
    cosine_classifier = torch.nn.Sequential(fc)
    log_q, classes = t.log_softmax(1).topk(3, dim=1)
    h, q, count, mask, epoch = torch.randn(8, 6), t.softmax(1), 11, targets != -100, 41
    return locals() | {"F": F}


CALLS = re.findall(r"`([^`\n]*selfkd\.[^`\n]*\))`", (DOCS / "choosing.md").read_text())


def run_situation(call: str, impl: object) -> Any:
    """Evaluate a call; the same names, and for masks the same seed, each time."""
    names = situations() | {"selfkd": impl}
    torch.manual_seed(SEED)
    return eval(call, names)


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_choosing(call: str) -> None:
    found = run_situation(call, selfkd)
    if "selfkd.nn" in call:
        assert isinstance(found, (torch.nn.Module, float))
        return
    if "selfkd.reference" in call:
        assert found.requires_grad  # of what is learned
        return
    expected = run_situation(call, selfkd.reference)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(bool(x.isfinite().all()) for x in (found if isinstance(found, tuple) else [found]))


def test_reverse_divergence() -> None:
    """The call that stands for KL(student || teacher) is that divergence."""
    call = next(call for call in CALLS if "reverse_weight=0.0" in call)
    names = situations()
    log_p, log_t = names["z"].log_softmax(1), names["t"].log_softmax(1)
    expected = F.kl_div(log_t, log_p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(run_situation(call, selfkd), expected)


def test_numpy_page() -> None:
    names: dict[str, Any] = {}
    for language, text in blocks(DOCS / "numpy.md"):
        if language == "python":
            exec(text, names)
    u, v = (torch.from_numpy(names[key]) for key in "uv")
    loss = torch.as_tensor(names["forward"].loss)
    torch.testing.assert_close(loss, selfkd.reference.sd_dropout_kl(u, v), rtol=3e-6, atol=0)


# ---- the build ----


def check_site(path: Path, text: str, site: dict[Path, str]) -> None:
    """Links of a built page lead somewhere, and all that it needs lies beside it."""
    for link in re.findall(r'<a [^>]*href="([^"]*)"', text):
        file, _, anchor = link.partition("#")
        to = (path.parent / file).resolve() if file else path
        if "://" not in link and anchor and to in site:
            assert f'id="{anchor}"' in site[to], f"{path}: {link}"
        elif "://" not in link:
            assert to.exists(), f"{path}: {link}"
    for needed in re.findall(r'<(?:script|img|source|link rel="stylesheet")[^>]*', text):
        assert "://" not in needed, f"{path}: {needed}"
    shown = re.sub(r"<(pre|code|title)\b.*?</\1>", "", text, flags=re.DOTALL)
    wrong = re.search(
        r".{,40}(\$|\\[a-z]|<merror).{,40}", shown
    )  # a formula that was not taken for one
    assert wrong is None, f"{path}: {wrong and wrong[0]}"


def test_sphinx_builds_without_a_warning(tmp_path: Path) -> None:
    """Every name, link and file that a page refers to is there."""
    for module in ("furo", "latex2mathml", "myst_parser"):
        pytest.importorskip(module, reason=f"there is no {module}: pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "cache"]
    done = subprocess.run(
        [*command, DOCS, tmp_path / "html"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    site = {path: path.read_text() for path in (tmp_path / "html").glob("**/*.html")}
    for path, text in site.items():
        check_site(path, text, site)
    api = site[tmp_path / "html" / "api.html"]
    for name in contract.modules():
        assert f'id="selfkd.{name}"' in api
        assert f'id="selfkd.reference.{name}"' in api
    for name in selfkd.nn.__all__:
        assert f'id="selfkd.nn.{name}"' in api
