"""The library as a citizen of a process: registration, messages, symbols, faults."""

from __future__ import annotations

import gc
import inspect
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import selfkd
import torch
from binary import check_needs_only_libc_and_exports_only_selfkd
from conftest import ROOT
from harness import needs_operators
from selfkd import c, contract, library

PREAMBLE = """
import ctypes, sys, warnings
warnings.simplefilter("error")
path = sys.argv[1]
def call(torch, u, v):
    return torch.ops.selfkd.sd_dropout_kl(u, v, u, False, u, False, 3.0, 1.0, 1.0, False, 1)[0]
"""
WITHOUT_TORCH = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Blocked())
"""


def python(code: str, *arguments: str, **environment: str) -> str:
    """Run a program in a fresh process; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, selfkd.library_path(), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- registration ----


@needs_operators
def test_loaded_before_torch() -> None:
    python("""
lib = ctypes.CDLL(path)
assert lib.selfkd_register_torch(b"selfkd") == 0
import torch
assert lib.selfkd_register_torch(b"selfkd") == 1
assert lib.selfkd_register_torch(b"selfkd") == 1
with torch.no_grad():
    assert call(torch, torch.ones(2, 3), torch.ones(2, 3)) == 0
""")


@needs_operators
def test_loaded_after_torch_and_twice() -> None:
    python("""
import torch
torch.ops.load_library(path)
torch.ops.load_library(path)
with torch.no_grad():
    assert call(torch, torch.ones(2, 3), torch.ones(2, 3)) == 0
""")


def test_import_selfkd_before_torch() -> None:
    python("""
lib = ctypes.CDLL(path)
import selfkd, torch
u = torch.randn(2, 3, requires_grad=True)
selfkd.sd_dropout_kl(u, u.detach() + 1).backward()
assert u.grad is not None
""")


@needs_operators
def test_a_second_copy_registers_nothing(tmp_path: Path) -> None:
    copy = shutil.copy(selfkd.library_path(), tmp_path / "libother.so")
    python(
        """
import torch
torch.ops.load_library(path)
other = ctypes.CDLL(sys.argv[2])
assert other.selfkd_register_torch(b"selfkd") == 0
other.selfkd_torch.restype = ctypes.c_char_p
said = other.selfkd_torch().decode()
assert path in said and sys.argv[2] in said, said
with torch.no_grad():
    assert call(torch, torch.ones(2, 3), torch.ones(2, 3)) == 0
""",
        str(copy),
    )


@needs_operators
def test_loaded_alone_it_never_trains_with_zero_gradients() -> None:
    python("""
import torch
torch.ops.load_library(path)
u = torch.randn(4, 5, requires_grad=True)
try:
    call(torch, u, u * 2)
    raise SystemExit("no error")
except RuntimeError as error:
    assert "sd_dropout_kl has no gradient until `import selfkd`" in str(error), error
with torch.no_grad():
    loss = call(torch, u, u * 2)
import selfkd
again = call(torch, u, u * 2)
assert torch.equal(loss, again)
again.backward()
assert u.grad.abs().sum() > 0
""")


def test_fork_after_use() -> None:
    python("""
import os, signal, torch, selfkd
torch.set_num_threads(2)
u = torch.randn(400, 1000)
v = u * 1.1
loss = selfkd.sd_dropout_kl(u, v)
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if selfkd.sd_dropout_kl(u, v).item() == loss.item() else 1)
assert os.waitpid(child, 0)[1] == 0
""")


def test_without_torch() -> None:
    out = python(
        WITHOUT_TORCH
        + """
import numpy as np, selfkd
u, v = np.zeros((2, 3), "f4"), np.ones((2, 3), "f4") * np.arange(3, dtype="f4")
print(selfkd.c.sd_dropout_kl(u, v).loss)
try:
    selfkd.sd_dropout_kl
    raise SystemExit("no error")
except ImportError as error:
    assert "needs PyTorch 2.8 or newer" in str(error)
from selfkd.cli import main
main(["info"])
"""
    )
    assert "not installed: the PyTorch functions are absent" in out
    assert float(out.split()[0]) > 0


OLD_TORCH = (
    WITHOUT_TORCH
    + """
import selfkd
sys.meta_path.pop(0)
from selfkd import library
lib = library.library()
class Old:
    def __getattr__(self, name):
        return (lambda _: 0) if name == "selfkd_register_torch" else getattr(lib, name)
said = "this PyTorch is older than 2.8: it has no such function"
text = library.text
library.library = Old
library.text = lambda name, *given: said if name == "selfkd_torch" else text(name, *given)
selfkd._load_torch_functions()
import torch
assert not hasattr(torch.ops.selfkd, "sd_dropout_kl")
"""
)
EVERY_FUNCTION = """
import hashlib, torch, selfkd
torch.manual_seed(0)
def show(result, *inputs):
    results = result if isinstance(result, tuple) else (result,)
    live = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad(results[0].sum(), live)
    for x in (*results, *found):
        if x is not None:
            data = x.detach().contiguous().view(-1).view(torch.uint8).numpy()
            print(tuple(x.shape), x.stride(), x.dtype, hashlib.sha256(data).hexdigest())
def new(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()
u, v, w, target = new(6, 11), new(6, 11), torch.rand(6), torch.arange(6)
show(selfkd.sd_dropout_kl(u, v), u, v)
show(selfkd.sd_dropout_kl(u, u, weight=w > 0.5, reduction="none"), u)
h = new(2, 5, 3, 3, dtype=torch.bfloat16)
g = new(2, 5, 3, 3, dtype=torch.bfloat16).detach()
show(selfkd.sd_dropout_kl(h, g, weight=torch.rand(2, 3, 3), divisor=7.0), h)
show(selfkd.distill(u, target, v.detach(), label_smoothing=0.1), u)
show(selfkd.distill(u.double(), target, (v.detach(), w[:, None].expand(6, 11)), return_parts=True), u)
show(selfkd.attention(h, torch.randn(2, 7, 3, 3)), h)
show(selfkd.simreg(u, v.detach(), weight=w), u)
show(selfkd.adversarial(u, v, mode="hinge"), u, v)
a, b, weight = new(1, 4, 8, 8), new(1, 4, 4, 4), torch.ones(2, requires_grad=True)
show(selfkd.bifpn_fuse(a, b, weight=weight, resize=(None, "nearest")), a, b, weight)
features, seed = new(6, 7), torch.tensor(5)
show(selfkd.dropout_views(features, seed), features)
W, bias = new(11, 7), new(11)
for reduction in ("mean", "none"):
    torch.manual_seed(1)
    show(selfkd.sd_dropout_head(features, W, bias, target, reduction=reduction), features, W, bias)
graph = torch.autograd.grad(selfkd.sd_dropout_kl(u, v), u, create_graph=True)[0]
show(graph.square().sum(), u)
with torch.no_grad():
    print(selfkd.sd_dropout_kl(u, v).item())
for bad in ({"temperature": 0.0}, {"weight": w[:3]}, {"weight": w.long()}):
    try:
        selfkd.sd_dropout_kl(u, v, **bad)
    except (ValueError, TypeError) as error:
        print(type(error), error)
try:
    selfkd.distill(u, target + 9)
except ValueError as error:
    print(error)
"""


@needs_operators
def test_a_pytorch_that_cannot_register_gives_the_same() -> None:
    registered = python(EVERY_FUNCTION + "assert torch.ops.selfkd.sd_dropout_kl")
    assert registered.count("\n") > 40
    by_ctypes = python(
        OLD_TORCH + EVERY_FUNCTION + "from selfkd.cli import main; main(['info'])",
        OMP_NUM_THREADS="1",
    )
    assert by_ctypes.startswith(registered)
    assert "functions run by ctypes, torch.ops.selfkd is absent" in by_ctypes


def test_a_pytorch_that_cannot_register_says_what_it_has_not() -> None:
    python(
        OLD_TORCH
        + """
x, t = torch.randn(2, 6, 5), torch.randn(6, 5)
def batched_values():
    torch.func.vmap(lambda y: selfkd.simreg(y, t))(x)
def batched_gradients():
    u = x[0].requires_grad_()
    rows = selfkd.simreg(u, t, reduction="none")
    torch.autograd.grad(rows, u, torch.eye(6), is_grads_batched=True)
for call in (batched_values, batched_gradients):
    try:
        call()
        raise SystemExit("no error")
    except RuntimeError as error:
        assert str(error) == (
            "simreg has no vmap and no batched gradients under PyTorch older than 2.8;"
            " selfkd.reference.simreg has both"
        ), error
"""
    )


def test_info() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "selfkd", "info"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for word in (
        selfkd.__version__,
        selfkd.library_path(),
        library.text("selfkd_isa"),
        torch.__version__,
        "sd_dropout_kl",
    ):
        assert word in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "selfkd", "dance"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


# ---- the library file ----


def test_needs_only_libc_and_exports_only_selfkd() -> None:
    check_needs_only_libc_and_exports_only_selfkd(selfkd.library_path())


def test_version_is_said_once() -> None:
    assert selfkd.__version__ == library.text("selfkd_version")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{selfkd.__version__}]" in changelog


def test_a_missing_or_foreign_library_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"cannot load .*nowhere\.so.*pip install \."):
        library.open_library(str(tmp_path / "nowhere.so"))
    with pytest.raises(
        ImportError, match="has no selfkd_version; it was built from another version"
    ):
        library.open_library("libm.so.6")


@needs_operators
def test_our_shim_prototypes_are_pytorchs() -> None:
    include = Path(torch.__file__).parent / "include"
    command = [
        "g++",
        "-std=c++20",
        "-fsyntax-only",
        f"-I{include}",
        f"-I{ROOT}/ops",
        f"-I{ROOT}/bindings",
    ]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "abi_check.cpp")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "program",
    [
        *("test_core", "test_kl", "test_load", "test_philox", "test_vectors"),
        *("test_math_plain", "test_math_fused", "test_math_f64", "test_math_f64_fused"),
    ],
)
def test_from_c(program: str, built: Path) -> None:
    done = subprocess.run([built / "tests" / program], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- one list of arguments ----


def test_python_defaults_are_the_contracts() -> None:
    for name in contract.operators():
        function = getattr(selfkd, name, None)
        if function is None:
            continue
        signature = inspect.signature(function)
        assert signature == inspect.signature(getattr(selfkd.reference, name))
        for item in contract.contract(name).items:
            if item.is_number and item.name in signature.parameters:
                default = signature.parameters[item.name].default
                if default is None:  # another argument's value
                    continue
                if item.choices:
                    default = item.choices.index(default)
                assert default == item.default, f"{name}: {item.name}"


@needs_operators
def test_schema_is_the_contract() -> None:
    for name in contract.operators():
        schema = getattr(torch.ops.selfkd, name).default._schema
        of = contract.contract(name)
        assert tuple(argument.name for argument in schema.arguments) == of.torch_arguments
        assert tuple(result.name for result in schema.returns) == tuple(
            item.name for item in of.outputs
        )
        assert schema.is_mutable == any(item.kind == "INOUT" for item in of.items)


# ---- errors ----

U = torch.randn(4, 10)
BAD = {
    "sd_dropout_kl: u has 1 dimension, expected at least 2": {"u": U[0], "v": U[0]},
    "sd_dropout_kl: u has 9 dimensions, expected at most 8": {
        "u": U.view(4, 10, *[1] * 7),
        "v": U.view(4, 10, *[1] * 7),
    },
    "sd_dropout_kl: v has 3 dimensions, expected 2": {"v": U[:, :, None]},
    "sd_dropout_kl: v has size 5 in dimension C, expected 10": {"v": U[:, :5]},
    "sd_dropout_kl: v has size 3 in dimension N, expected 4": {"v": U[:3]},
    "sd_dropout_kl: v has size 1 in dimension 2, expected 2": {
        "u": U.view(4, 5, 2),
        "v": U.view(4, 5, 2)[:, :, :1],
    },
    "sd_dropout_kl: u has size 0 in dimension C, expected at least 1": {
        "u": U[:, :0],
        "v": U[:, :0],
    },
    "sd_dropout_kl: u has dtype int64, expected float16, bfloat16, float32 or float64": {
        "u": U.long(),
        "v": U.long(),
    },
    "sd_dropout_kl: u has dtype complex64, expected float16, bfloat16, float32 or float64": {
        "u": U.cfloat()
    },
    "sd_dropout_kl: v has dtype float64, expected float32 like u": {"v": U.double()},
    "sd_dropout_kl: temperature is 0, expected a finite number > 0": {"temperature": 0.0},
    "sd_dropout_kl: temperature is -2.5, expected a finite number > 0": {"temperature": -2.5},
    "sd_dropout_kl: temperature is nan, expected a finite number > 0": {
        "temperature": float("nan")
    },
    "sd_dropout_kl: temperature is inf, expected a finite number > 0": {
        "temperature": float("inf")
    },
    "sd_dropout_kl: forward_weight is -1, expected a finite number >= 0": {"forward_weight": -1.0},
    "sd_dropout_kl: reverse_weight is nan, expected a finite number >= 0": {
        "reverse_weight": float("nan")
    },
    "sd_dropout_kl: weight has size 3 in dimension N, expected 4": {"weight": torch.ones(3)},
    "sd_dropout_kl: weight has 2 dimensions, expected 1": {"weight": torch.ones(4, 1)},
    "sd_dropout_kl: weight has dtype float64, expected float32 or bool": {
        "weight": torch.ones(4).double()
    },
    "sd_dropout_kl: weight has dtype int64, expected float32 or bool": {
        "weight": torch.ones(4).long()
    },
    "sd_dropout_kl: divisor has 1 dimension, expected 0": {"divisor": torch.ones(1)},
}
PYTHON_ONLY = {
    'sd_dropout_kl: reduction is "avg", expected "none", "mean" or "sum"': {"reduction": "avg"},
    "sd_dropout_kl: weight requires grad": {"weight": torch.ones(4, requires_grad=True)},
    "sd_dropout_kl: divisor requires grad": {"divisor": torch.ones((), requires_grad=True)},
    "sd_dropout_kl: divisor is 0, expected a finite number > 0": {"divisor": 0.0},
    'sd_dropout_kl: divisor is given, expected reduction "mean"': {
        "divisor": 2.0,
        "reduction": "sum",
    },
    "sd_dropout_kl: dim is 2, expected -2 to 1 for u": {"dim": 2},
}


def torch_call(given: dict[str, object]) -> None:
    """The registered operator with a function's arguments."""
    u = given["u"]
    values = {"temperature": 3.0, "forward_weight": 1.0, "reverse_weight": 1.0} | given
    optional = [x for name in ("weight", "divisor") for x in (values.get(name, u), name in values)]
    numbers = [values[name] for name in ("temperature", "forward_weight", "reverse_weight")]
    torch.ops.selfkd.sd_dropout_kl(u, values["v"], *optional, *numbers, False, 1)


@pytest.mark.parametrize("sentence", BAD)
def test_the_same_sentence_everywhere(sentence: str) -> None:
    given = {"u": U, "v": U} | BAD[sentence]
    kind = TypeError if "dtype" in sentence else ValueError
    for require in (False, True):
        live = {
            k: x.detach().requires_grad_(require and x.is_floating_point()) if k in "uv" else x
            for k, x in given.items()
        }
        with pytest.raises(kind) as raised:
            selfkd.sd_dropout_kl(**live)
        assert str(raised.value).split("; ")[0] == sentence  # behind it, what to write instead
    if "complex" not in sentence:
        with pytest.raises(kind) as raised:
            c.sd_dropout_kl(**given)
        assert str(raised.value) == sentence
    checked = {
        "forward_weight": 1.0,
        "reverse_weight": 1.0,
        "temperature": 3.0,
        "detach_target": False,
        "reduction": 1,
    }
    status = c.run(library.library(), "sd_dropout_kl", checked | given | outputs())
    assert status == (2 if kind is TypeError else 1)
    assert library.text("selfkd_message") == sentence


@needs_operators
@pytest.mark.parametrize("sentence", BAD)
def test_the_same_sentence_from_the_operator(sentence: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch_call({"u": U, "v": U} | BAD[sentence])
    assert str(raised.value).splitlines()[0] == sentence


def outputs() -> dict[str, np.ndarray]:
    scalar = [np.zeros((), "f4") for _ in range(2)]
    return {
        "loss": scalar[0],
        "rows": np.zeros(4, "f4"),
        "saved": np.zeros((4, 4)),
        "denominator": scalar[1],
    }


@pytest.mark.parametrize("sentence", PYTHON_ONLY)
def test_sentences_of_the_functions(sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + sentence):
        selfkd.sd_dropout_kl(U, U, **PYTHON_ONLY[sentence])


@needs_operators
def test_bad_reduction_code() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"^sd_dropout_kl: reduction is 7, expected 0 \(none\), 1 \(mean\) or 2 \(sum\)",
    ):
        torch.ops.selfkd.sd_dropout_kl(U, U, U, False, U, False, 3.0, 1.0, 1.0, False, 7)


def test_other_devices() -> None:
    with pytest.raises(TypeError, match="v is on meta, expected cpu like u"):
        selfkd.sd_dropout_kl(U, U.to("meta"))


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a GPU: tests marked cuda run instead"
)
def test_cuda_tensors_without_a_gpu_give_a_sentence() -> None:
    arguments = {
        "u": U,
        "v": U,
        "temperature": 3.0,
        "forward_weight": 1.0,
        "reverse_weight": 1.0,
        "reduction": 1,
    }
    assert c.run(library.library(), "sd_dropout_kl", arguments | outputs(), device=2) == 4
    message = library.text("selfkd_message")
    assert "no CUDA kernels; rebuild with nvcc" in message or "no CUDA driver was found" in message


@needs_operators
def test_20000_failing_calls_leak_nothing() -> None:
    u = U.detach().requires_grad_()

    def fail(times: int) -> int:
        for _ in range(times // 2):
            with pytest.raises(RuntimeError):
                torch_call({"u": u, "v": U, "temperature": -1.0})
            with pytest.raises(ValueError, match="size 3"):
                selfkd.sd_dropout_kl(u, U[:3])
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = fail(2000)
    assert (
        fail(20000) - before < 1500
    )  # KB: less than 0.1 bytes a call would be noise, a handle is 64


# ---- the C interface from Python ----


def test_numpy_round_trip() -> None:
    u, v = U.numpy(), (U * 1.1).numpy()
    forward = c.sd_dropout_kl(u, v, temperature=2.0, reduction="sum")
    backward = c.sd_dropout_kl_backward(
        np.float32(1.0).reshape(()),
        u,
        v,
        saved=forward.saved,
        denominator=forward.denominator,
        temperature=2.0,
    )
    a, b = (torch.from_numpy(x).requires_grad_() for x in (u, v))
    loss = selfkd.sd_dropout_kl(a, b, temperature=2.0, reduction="sum")
    grads = torch.autograd.grad(loss, (a, b))
    assert torch.equal(torch.as_tensor(forward.loss), loss.detach())
    assert torch.equal(torch.from_numpy(backward.grad_u), grads[0])
    assert torch.equal(torch.from_numpy(backward.grad_v), grads[1])
    into = np.zeros(4, "f4")
    assert c.sd_dropout_kl(u, v, out={"rows": into}).rows is into
    assert into.any()
    with pytest.raises(TypeError, match="temprature is no argument"):
        c.sd_dropout_kl(u, v, temprature=2.0)
    with pytest.raises(TypeError, match="sd_dropout_kl: v is missing"):
        c.sd_dropout_kl(u)


def test_an_empty_array_may_have_any_strides() -> None:
    x = np.lib.stride_tricks.as_strided(np.zeros(64, "f4"), (2, 9, 0, 4), (0, 4, 4, 36))
    assert c.simreg(x, x, reduction="sum").loss == 0


def test_only_device_cuh_knows_of_the_emulator() -> None:
    for path in (ROOT / "cuda").rglob("*.*"):
        if path.name != "device.cuh":
            text = path.read_text().replace("tests/test_simt.py", "").lower()
            assert "simt" not in text, path
