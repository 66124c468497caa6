"""The kernel of `make hub`, which runs this: $HUB is its folder."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import samples
import selfkd
import torch
import torch.nn.functional as F
from binary import check_is_hardened, check_needs_only_libc_and_exports_only_selfkd
from conftest import ROOT

kernels = pytest.importorskip("kernels", reason="of a kernel for the Hub: make hub")
kernels_rust = pytest.importorskip("kernels._rust")
HUB = Path(os.environ["HUB"]).absolute()
(VARIANT,) = (HUB / "build").iterdir()
PAGE = ROOT / "docs" / "hub.md"
METADATA = json.loads((VARIANT / "metadata.json").read_text())
TRAINING = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
each_operator = pytest.mark.parametrize("op", selfkd.contract.modules())


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    loaded: ModuleType = kernels.get_local_kernel(HUB)
    return loaded


@pytest.fixture(scope="module")
def revision(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The kernel once more, as if of another build."""
    folder = tmp_path_factory.mktemp("revision")
    shutil.copytree(VARIANT, folder / VARIANT.name)
    metadata = METADATA | {"id": "_selfkd_cpu_revision"}
    (folder / VARIANT.name / "metadata.json").write_text(json.dumps(metadata))
    loaded: ModuleType = kernels.get_local_kernel(folder)
    return loaded


# ---- what the Hub asks of the files ----


def test_metadata() -> None:
    metadata = kernels_rust.Metadata.read_from_file(VARIANT / "metadata.json")
    assert str(metadata.name) == "selfkd"
    assert metadata.id.isidentifier()
    assert metadata.backend.backend_type == kernels_rust.Backend.CPU
    algorithm = metadata.digest.algorithm
    metadata.digest.validate(kernels_rust.Digest.hash_variant(algorithm, VARIANT))


def test_library() -> None:
    check_needs_only_libc_and_exports_only_selfkd(VARIANT / "libselfkd.so")
    check_is_hardened(VARIANT / "libselfkd.so")


@pytest.mark.parametrize("path", sorted(VARIANT.rglob("*.py")), ids=lambda path: path.stem)
def test_it_imports_itself_the_standard_library_and_torch(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    if path.stem == "c":  # the functions for arrays, where NumPy is because they are
        allowed.add("numpy")
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        assert {name.split(".")[0] for name in names} <= allowed


def test_it_is_loaded_where_no_other_selfkd_is() -> None:
    code = """
import sys
sys.modules["selfkd"] = None
import kernels, pathlib, torch
kernel = kernels.get_local_kernel(pathlib.Path(sys.argv[1]))
u = torch.randn(2, 3, requires_grad=True)
kernel.sd_dropout_kl(u, u.detach() + u.sum().item()).backward()
assert u.grad is not None
assert not hasattr(torch.ops.selfkd, "sd_dropout_kl")
"""
    done = subprocess.run([sys.executable, "-c", code, HUB], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what it does ----


def test_its_name_is_its_namespace(kernel: ModuleType, revision: ModuleType) -> None:
    for loaded in kernel, revision, selfkd:
        assert loaded.library.text("selfkd_torch_namespace") == loaded.__name__
    assert kernel.__name__ == METADATA["id"]
    assert kernel.library_path() == str(VARIANT / "libselfkd.so")
    assert {kernel.__name__, revision.__name__, "selfkd"} == {
        x.__module__.split(".")[0] for x in (kernel.distill, revision.distill, selfkd.distill)
    }


def test_it_shows_what_is_public(kernel: ModuleType) -> None:
    assert sorted(kernel.__all__) == dir(kernel)
    assert set(kernel.__all__) == set(selfkd.__all__)
    assert kernel.layers.__all__ == selfkd.layers.__all__


@each_operator
def test_operators(op: str, kernel: ModuleType, revision: ModuleType) -> None:
    """Three copies in one process: forward and backward, in one graph too, give the same bits."""
    torch._dynamo.reset()
    expected = samples.run(op)
    for loaded in kernel, revision:
        function = getattr(loaded, op)
        for backend in "eager", "aot_eager", *["inductor"] * (op == "sd_dropout_kl"):
            compiled = torch.compile(function, fullgraph=True, backend=backend)
            for f in function, compiled:
                assert all(map(torch.equal, samples.run(op, function=f), expected)), backend


@each_operator
def test_kernelized(op: str, kernel: ModuleType) -> None:
    """The layer takes the place of a user's own, in training under torch.compile."""
    reference = getattr(selfkd.reference, op)
    # A module that calls the function and has its arguments, which stands for a user's own.
    own = type("Own", (torch.nn.Module,), {"forward": getattr(selfkd.layers, op).forward})
    kernels.replace_kernel_forward_from_hub(own, op)
    repository = kernels.LocalLayerRepository(HUB, layer_name=op)
    with kernels.use_kernel_mapping({op: {"cpu": {TRAINING: repository}}}):
        made = kernels.kernelize(own(), mode=TRAINING, device="cpu", use_fallback=False)
    assert made.forward.__func__ is getattr(kernel.layers, op).forward
    expected = samples.run(op, function=reference)
    for found, exact in zip(samples.run(op, function=made), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


class Language:
    """A small causal language model of Transformers, and a batch."""

    def __init__(self) -> None:
        transformers = pytest.importorskip("transformers")
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 61}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
        torch.manual_seed(0)
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        self.tokens = torch.randint(61, (2, 9))
        self.labels = self.tokens.clone()
        self.labels[0, 4:] = -100

    def trained(self) -> list[torch.Tensor]:
        """Loss and gradients."""
        self.model.zero_grad()
        given = {"labels": self.labels, "num_items_in_batch": torch.tensor(7)}
        loss = self.model(self.tokens, **given).loss
        loss.backward()
        return [loss.detach(), *(x.grad.clone() for x in self.model.parameters())]

    def check_is_trained_by(self, kernel: ModuleType, expected: list[torch.Tensor]) -> None:
        """Raise unless the kernel made the loss, and it is as expected."""
        calls = kernel.library.library().selfkd_call_count
        before = calls(b"distill_backward")
        for x, y in zip(self.trained(), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
        assert calls(b"distill_backward") == before + 1


def test_causal_language_model(kernel: ModuleType) -> None:
    """The loss of Transformers is replaced on the CPU, and compiles to one graph."""
    language = Language()
    expected = language.trained()
    theirs = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    replaceable = kernels.use_kernel_forward_from_hub("ForCausalLMLoss")(theirs)
    language.model._loss_function = replaceable  # where kernelize looks for modules
    repository = kernels.LocalLayerRepository(HUB, layer_name="ForCausalLMLoss")
    with kernels.use_kernel_mapping({"ForCausalLMLoss": {"cpu": {TRAINING: repository}}}):
        kernels.kernelize(language.model, mode=TRAINING, device="cpu")
    language.check_is_trained_by(kernel, expected)
    compiled = torch.compile(language.model.loss_function, fullgraph=True)
    given = torch.randn(2, 9, 61), language.labels, 61
    assert torch.equal(compiled(*given), kernel.layers.ForCausalLMLoss()(*given))


def test_page(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/hub.md shows, with a kernel in build/hub."""
    monkeypatch.chdir(HUB.parent.parent)
    language = Language()
    expected = language.trained()
    u, v, y = torch.randn(4, 5), torch.randn(4, 5), torch.arange(4)
    names = {"torch": torch, "F": F, "logits": u, "target": y, "teacher_logits": v}
    names["model"] = language.model
    for text in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(text, names)
    assert torch.equal(names["loss"], selfkd.distill(u, y, v))
    assert names["criterion"].forward.__func__ is kernel.layers.attention.forward
    maps = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(names["criterion"](*maps), names["Attention"]()(*maps))
    language.check_is_trained_by(kernel, expected)
