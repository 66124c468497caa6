"""The machine code of the CUDA kernels: registers, local memory, 16-byte accesses, atomics.

No GPU is needed: the library under test holds the code, and `cuobjdump` takes it apart.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import selfkd
import torch
from conftest import ROOT
from sass import BYTES, MISSING, Kernel, disassembler, kernels_of
from selfkd import contract, library

# Blocks that a multiprocessor must hold at once; 2, a quarter of its threads, if not named.
BLOCKS = {
    "adversarial_kernel": 5,
    "adversarial_backward_kernel": 5,
    "attention_kernel": 4,
    "attention_backward_planes_kernel": 5,
    "attention_backward_rows_kernel": 4,
}
# The same of kernels with 16-byte accesses in float and half types: 3 if neither names them.
WIDE_BLOCKS = {
    "distill_kernel": 2,
    "distill_backward_kernel": 2,
    "js_divergence_kernel": 2,
    "js_divergence_backward_kernel": 2,  # any mixture; Jensen-Shannon alone has 3
    "sd_dropout_head_kernel": 2,
    "topk_divergence_kernel": 2,  # the listed classes are measured in double
    "topk_divergence_backward_kernel": 2,
}
# 16-byte loads of the rows that have the kernel's dtype, loads of those with one of their own (once
# for each dtype there is), 16-byte stores. Of distill, the second is for each teacher. Of what is not
# here `accesses` reads the contract: a loss of rows loads each once and stores each gradient.
WIDE = {
    "distill_kernel": (1, 1, 0),
    "distill_backward_kernel": (1, 1, 1),
    "sd_dropout_head_kernel": (6, 0, 3),
    "js_divergence_kernel": (6, 0, 0),  # for sums, for close rows, and for the loss
    "simreg_kernel": (2, 2, 0),  # for the lengths, and for the differences of close rows
    "dropout_views_kernel": (1, 0, 2),
    "dropout_views_backward_kernel": (3, 0, 1),
    "attention_kernel": (8, 0, 0),  # of planes and of rows, in four dtypes
    "attention_backward_rows_kernel": (1, 0, 1),
    "attention_backward_planes_kernel": (1, 0, 1),
}
# What may keep something in local memory: how many bytes of stack, how many accesses in the loop over
# classes, and why. "vector": with 16-byte accesses in float or half types; "other": all other instances.
LOCAL = {
    ("attention_kernel", "other"): (32, 0, "addresses of rows without 16-byte accesses"),
    ("distill_kernel", "vector"): (72, 0, "two teachers: a few words of a row, not of a class"),
    ("distill_kernel", "other"): (128, 60, "two teachers in double; or an address for each item"),
    ("distill_backward_kernel", "other"): (48, 26, "two teachers in double, on sm_90"),
    ("sd_dropout_head_kernel", "vector"): (8, 0, "a number of a row; sm_90"),
    ("sd_dropout_head_kernel", "other"): (64, 8, "in double, or with an address for each item"),
    ("sd_dropout_kl_backward_kernel", "other"): (8, 2, "in double, on sm_90"),
    ("js_divergence_kernel", "other"): (88, 60, "in double: each visit has numbers of its own"),
}


ROWS = ("FLOATING", "SAME")  # of the kernel's dtype


def accesses(kernel: Kernel) -> tuple[int, int, int]:
    """What `WIDE` says of a kernel, or else the contract, of one that loads each row once."""
    op = kernel.name.removesuffix("_kernel")
    if kernel.name in WIDE or op not in contract.operators():
        return WIDE.get(kernel.name, (0, 0, 0))
    of = contract.contract(op)
    rows = [x for x in of.items if x.is_input and x.shape == "NC*"]
    own = sum(x.rule in ROWS for x in rows)
    stores = sum(x.kind == "LIKE" and of[x.shape] in rows for x in of.items)
    return (own, len(rows) - own, stores)


def least_blocks(kernel: Kernel) -> int:
    """How many blocks a multiprocessor must hold: 3 of a kernel that loads rows 16 bytes at a time.

    Of a loss of cuda/core/pair_loss.cuh, forward visits them three times: 2.
    """
    if kernel.vector and kernel.dtype != "d" and sum(accesses(kernel)):
        source = ROOT / "cuda" / f"{kernel.name.removesuffix('_kernel')}.cu"
        visits = source.exists() and "SK_PAIR_LOSS(" in source.read_text()
        return WIDE_BLOCKS.get(kernel.name, BLOCKS.get(kernel.name, 2 if visits else 3))
    return BLOCKS.get(kernel.name, 2)


def faults(kernel: Kernel) -> Iterator[str]:
    """What is wrong with it, in words."""
    hot = kernel.vector and kernel.dtype != "d"
    allowed, in_loop, _ = LOCAL.get((kernel.name, "vector" if hot else "other"), (0, 0, ""))
    local = kernel.seen["local"]
    if kernel.stack > allowed or (local and not allowed):
        yield f"{kernel.stack} bytes of stack, {local} accesses to local memory"
    if kernel.local_in_loop() > in_loop:
        yield f"{kernel.local_in_loop()} accesses to local memory in the loop"
    wanted = least_blocks(kernel)
    if kernel.blocks < wanted:
        yield f"{kernel.registers} registers: {kernel.blocks} blocks, {wanted} wanted"
    wide = kernel.vector or not kernel.arguments  # a kernel for all dtypes looks at run time
    loads, of_any, stores = accesses(kernel) if wide else (0, 0, 0)
    teachers = kernel.arguments[1] if kernel.name.startswith("distill") and of_any else 1
    if of_any:
        items = 16 // BYTES[kernel.dtype]
        loads += of_any * teachers * sum(items * size // 16 for size in BYTES.values())
    if kernel.seen["load"] < loads or kernel.seen["store"] < stores:
        yield (
            f"{kernel.seen['load']} 16-byte loads, {kernel.seen['store']} stores, {loads} and {stores} "
            f"wanted: if it cannot, a line of WIDE says why"
        )
    if kernel.seen["atomic"]:
        yield "atomics on floating-point numbers"


needs_disassembler = pytest.mark.skipif(disassembler() is None, reason=MISSING)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd_dropout_kl_kernel", (2, 0, 0)),
        ("sd_dropout_kl_backward_kernel", (2, 0, 2)),
        ("simreg_backward_kernel", (1, 1, 1)),
        ("adversarial_kernel", (0, 0, 0)),
        ("attention_kernel", WIDE["attention_kernel"]),
    ],
)
def test_what_a_contract_wants(name: str, expected: tuple[int, int, int]) -> None:
    kernel = Kernel("sm_90", f"_Z{len(name)}{name}IfLi4EEv")
    assert accesses(kernel) == expected
    assert least_blocks(kernel) == BLOCKS.get(name, 3)


def test_one_sentence_for_what_is_no_operator() -> None:
    command = [sys.executable, str(ROOT / "tests" / "sass.py"), "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.startswith("sass: there is no cuda/nothing.cu, expected")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@needs_disassembler
@pytest.mark.only_with(
    not library.text("selfkd_cuda").startswith("none"),
    "CUDA kernels in the library: build it where nvcc is found",
)
def test_every_kernel() -> None:
    kernels = kernels_of(Path(selfkd.library_path()))
    assert kernels
    names = {kernel.name for kernel in kernels}
    for source in (ROOT / "cuda").glob("*.cu"):
        assert any(name.startswith(source.stem) for name in names), source
    assert names >= set(BLOCKS) | set(WIDE_BLOCKS) | set(WIDE) | {name for name, _ in LOCAL}
    if not torch.cuda.is_available():
        assert {kernel.arch for kernel in kernels} == {"sm_80", "sm_90"}
    found = [f"{kernel}: {fault}" for kernel in kernels for fault in faults(kernel)]
    assert not found, "\n".join(found)
    print(f"{len(kernels)} kernels")


WRONG = r"""
template <typename T, int kVec>
__global__ void attention_backward_rows_kernel(const float *a, const float *b, float *c, int n) {
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * kVec;
#if defined(SCALAR)
    for (int k = 0; k < kVec; k++) c[i + k + 1] = a[i + k + 1] + b[i + k + 1];
#elif defined(LOCAL_ARRAY)
    float x[32];
    for (int k = 0; k < 32; k++) x[k] = a[i * k];
    for (int k = 0; k < n; k++) x[(i * k) % 32] += b[k];
    for (int k = 0; k < 32; k++) c[i * k] = x[k];
#elif defined(LOCAL_IN_LOOP)
    float x[32];
    for (int k = 0; k < 32; k++) x[k] = 0;
    for (int k = 0; k < n; k++) x[(i * k) % 32] += b[k];
    for (int k = 0; k < 32; k++) c[i * k] = x[k];
#elif defined(SPILLED)
    float x[120];
#pragma unroll
    for (int k = 0; k < 120; k++) x[k] = a[i + k * n];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 120; k++) c[i + k * n] = x[119 - k] * x[k];
#else
    float4 x = *(const float4 *)(a + i);
    const float4 y = *(const float4 *)(b + i);
    x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
#ifdef ATOMIC
    atomicAdd(c, x.x);
#endif
    *(float4 *)(c + i) = x;
#endif
}
template __global__ void attention_backward_rows_kernel<float, 4>(const float *, const float *,
                                                               float *, int);
"""


@needs_disassembler
@pytest.mark.only_with(shutil.which("nvcc") is not None, "nvcc: the CUDA toolkit")
@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ("RIGHT", ""),
        ("SCALAR", "0 16-byte loads, 0 stores"),
        ("LOCAL_ARRAY", "bytes of stack"),
        ("LOCAL_IN_LOOP", "accesses to local memory in the loop"),
        ("SPILLED", "bytes of stack"),
        ("MANY_REGISTERS", "2 blocks, 4 wanted"),
        ("ATOMIC", "atomics on floating-point numbers"),
    ],
)
def test_what_is_wrong_is_found(wrong: str, fault: str, tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text(WRONG)
    options = {"SPILLED": ["-maxrregcount=32"], "MANY_REGISTERS": ["-DSPILLED"]}.get(wrong, [])
    command = [
        "nvcc",
        "-cubin",
        "-arch=sm_90",
        f"-D{wrong}",
        *options,
        "-o",
        "wrong.cubin",
        "wrong.cu",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    (kernel,) = kernels_of(tmp_path / "wrong.cubin")
    found = list(faults(kernel))
    assert any(fault in x for x in found) if fault else not found, found
