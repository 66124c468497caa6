"""The machine code of the CUDA kernels: registers, local memory, 16-byte accesses, atomics.

No GPU is needed: the library under test holds the code, and `cuobjdump` takes it apart.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import selfkd
import torch
from conftest import ROOT
from selfkd import library

THREADS = 256  # SK_BLOCK
BYTES = {"d": 8, "f": 4, "6__half": 2, "13__nv_bfloat16": 2}
# On sm_90 what a kernel uses counts the 1 KiB that CUDA keeps of each block.
SHARED = {"sm_80": 164, "sm_90": 228}  # KiB of a multiprocessor (CUDA C++ Programming Guide, 21.1)

# Blocks that a multiprocessor must hold at once; 2, a quarter of its threads, if not named.
BLOCKS = {
    "adversarial_kernel": 5,
    "adversarial_backward_kernel": 5,
    "attention_kernel": 4,
    "attention_backward_planes_kernel": 5,
    "attention_backward_rows_kernel": 4,
}
# The same of kernels with 16-byte accesses in float and half types.
WIDE_BLOCKS = {
    "sd_dropout_kl_kernel": 3,
    "sd_dropout_kl_backward_kernel": 3,
    "simreg_kernel": 3,
    "simreg_backward_kernel": 3,
    "dropout_views_kernel": 3,
    "dropout_views_backward_kernel": 3,
}
# 16-byte loads of the rows that have the kernel's dtype, loads of those with one of their own (once
# for each dtype there is), 16-byte stores. Of distill, the second is for each teacher.
WIDE = {
    "sd_dropout_kl_kernel": (2, 0, 0),
    "sd_dropout_kl_backward_kernel": (2, 0, 2),
    "distill_kernel": (1, 1, 0),
    "distill_backward_kernel": (1, 1, 1),
    "sd_dropout_head_kernel": (6, 0, 3),
    "simreg_kernel": (2, 2, 0),
    "simreg_backward_kernel": (1, 1, 1),
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
}


# What is counted in a listing.
PATTERNS = {
    "local": re.compile(r"\b(?:LDL|STL)\b"),
    "load": re.compile(r"\bLDG\.E\.128\b"),
    "store": re.compile(r"\bSTG\.E\.128\b"),
    "atomic": re.compile(r"\b(?:RED|ATOM)[GS]?\.\S*\b(?:F16|F32|F64|BF16)"),
}
INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\d+ )?(LD[GL]|STL|BRA)\b(?:.*?(0x[0-9a-f]+) ;)?"
)


@dataclass
class Kernel:
    """One instance of a kernel for one architecture, from its listing and its use of resources."""

    arch: str
    symbol: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    seen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PATTERNS, 0))
    at: dict[str, list[int]] = field(default_factory=lambda: {"LDG": [], "local": []})
    loops: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        found = re.match(r"_Z(\d+)(\w+)", self.symbol)
        assert found, self.symbol
        self.name = found[2][: int(found[1])]
        rest = found[2][int(found[1]) :]
        known = re.match(rf"I({'|'.join(BYTES)})((?:Li\d+E)*)E", rest)
        self.dtype = known[1] if known else ""
        self.arguments = [int(x) for x in re.findall(r"Li(\d+)E", known[2])] if known else []

    def __str__(self) -> str:
        return f"{self.name}<{', '.join([self.dtype, *map(str, self.arguments)])}> {self.arch}"

    @property
    def vector(self) -> bool:
        """Whether its accesses are of 16 bytes; its first number counts the items."""
        return bool(self.arguments) and self.arguments[0] * BYTES[self.dtype] == 16

    @property
    def blocks(self) -> int:
        """How many blocks of 256 threads a multiprocessor holds at once."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 16384 // per_warp * 4 // (THREADS // 32)
        shared = SHARED.get(self.arch, 100) * 1024
        return min(by_registers, shared // (self.shared + 1024), 2048 // THREADS)

    def read(self, line: str) -> None:
        """Takes in a line of its listing."""
        for name, pattern in PATTERNS.items():
            self.seen[name] += bool(pattern.search(line))
        if found := INSTRUCTION.search(line):
            at, what = int(found[1], 16), found[2]
            if what != "BRA":
                self.at["LDG" if what == "LDG" else "local"].append(at)
            elif found[3] and int(found[3], 16) < at:
                self.loops.append((int(found[3], 16), at))

    def local_in_loop(self) -> int:
        """Accesses to local memory in the loop that loads most, of those without such a loop in it."""

        def within(loop: tuple[int, int], what: str) -> int:
            return sum(loop[0] <= at <= loop[1] for at in self.at[what])

        loading = {loop for loop in self.loops if within(loop, "LDG")}
        inner = [x for x in loading if not any(x[0] <= a and b <= x[1] for a, b in loading - {x})]
        return within(max(inner, key=lambda loop: within(loop, "LDG")), "local") if inner else 0

    def faults(self) -> Iterator[str]:
        """What is wrong with it, in words."""
        hot = self.vector and self.dtype != "d"
        allowed, in_loop, _ = LOCAL.get((self.name, "vector" if hot else "other"), (0, 0, ""))
        local = self.seen["local"]
        if self.stack > allowed or (local and not allowed):
            yield f"{self.stack} bytes of stack, {local} accesses to local memory"
        if self.local_in_loop() > in_loop:
            yield f"{self.local_in_loop()} accesses to local memory in the loop"
        wanted = BLOCKS.get(self.name, 2)
        if hot:
            wanted = WIDE_BLOCKS.get(self.name, wanted)
        if self.blocks < wanted:
            yield f"{self.registers} registers: {self.blocks} blocks, {wanted} wanted"
        wide = self.vector or not self.arguments  # a kernel for all dtypes looks at run time
        loads, of_any, stores = WIDE.get(self.name, (0, 0, 0)) if wide else (0, 0, 0)
        teachers = self.arguments[1] if self.name.startswith("distill") and of_any else 1
        if of_any:
            items = 16 // BYTES[self.dtype]
            loads += of_any * teachers * sum(items * size // 16 for size in BYTES.values())
        if self.seen["load"] < loads or self.seen["store"] < stores:
            yield f"{self.seen['load']} 16-byte loads, {self.seen['store']} stores"
        if self.seen["atomic"]:
            yield "atomics on floating-point numbers"


def disassembler() -> str | None:
    """Where cuobjdump is: among Python's packages, in the CUDA toolkit, or on the path."""
    folders = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        folders.append(str(Path(nvcc).resolve().parent))
    return shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ["PATH"]]))


def listing(binary: Path, *options: str) -> Iterator[str]:
    """What cuobjdump says of a library or cubin, line by line; nothing where it holds no code."""
    tool = disassembler()
    if tool is None:
        pytest.skip("cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    path = os.pathsep.join([str(Path(tool).parent), os.environ["PATH"]])
    command, environment = [tool, *options, str(binary)], os.environ | {"PATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = False
        for line in process.stdout:
            said = True
            yield line
    assert process.returncode == 0 or not said, process.returncode


def kernels_of(binary: Path) -> list[Kernel]:
    """All kernels in a library or cubin, the architectures side by side."""
    arch, kernels = "", {}
    for line in listing(binary, "-res-usage"):
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif " Function " in line:
            kernel = Kernel(arch, line.split()[-1].rstrip(":"))
            kernels[arch, kernel.symbol] = kernel
        elif "REG:" in line:
            use = {name: int(x) for name, x in re.findall(r"(\w+):(\d+)", line)}
            kernel.registers, kernel.shared = use["REG"], use["SHARED"]
            kernel.stack = use["STACK"] + use["LOCAL"]

    def read(arch: str) -> None:
        for line in listing(binary, "-sass", *(["-arch", arch] if arch else [])):
            if "Function : " in line:
                kernel = kernels[arch, line.split()[-1]]
            elif re.search("LD|ST|RED|ATOM|BRA", line):
                kernel.read(line)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, sorted({arch for arch, _ in kernels})))
    return list(kernels.values())


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
    faults = [f"{kernel}: {fault}" for kernel in kernels for fault in kernel.faults()]
    assert not faults, "\n".join(faults)
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
    faults = list(kernel.faults())
    assert any(fault in found for found in faults) if fault else not faults, faults
