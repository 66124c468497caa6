"""Takes the machine code of CUDA kernels apart; as a script, that of one operator: `make sass OP=name`.

No GPU is needed: nvcc compiles `cuda/OP*.cu` alone, for sm_90 unless another architecture is named, and
cuobjdump lists it. For each kernel it prints registers, how many blocks of 256 threads a multiprocessor
holds, bytes of stack, instructions, and its innermost loops with loads from global memory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
THREADS = 256  # SK_BLOCK
BYTES = {"d": 8, "f": 4, "6__half": 2, "13__nv_bfloat16": 2}
# On sm_90 what a kernel uses counts the 1 KiB that CUDA keeps of each block.
SHARED = {"sm_80": 164, "sm_90": 228}  # KiB of a multiprocessor (CUDA C++ Programming Guide, 21.1)
INSTRUCTION_BYTES = 16  # from sm_70 on
MISSING = "cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"

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
    instructions: int = 0
    seen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PATTERNS, 0))
    at: dict[str, list[int]] = field(default_factory=lambda: {"LDG": [], "wide": [], "local": []})
    loops: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        found = re.match(r"_Z(\d+)(\w+)", self.symbol)
        assert found, self.symbol
        self.name = found[2][: int(found[1])]
        rest = found[2][int(found[1]) :]
        known = re.match(rf"I({'|'.join(BYTES)})((?:Li\d+E)*)(?:\d+[a-z_]+)?E", rest)
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
                if PATTERNS["load"].search(line):
                    self.at["wide"].append(at)
            elif found[3] and int(found[3], 16) < at:
                self.loops.append((int(found[3], 16), at))

    def within(self, loop: tuple[int, int], what: str) -> int:
        """How many accesses of a kind are in a loop."""
        return sum(loop[0] <= at <= loop[1] for at in self.at[what])

    def loading_loops(self) -> list[tuple[int, int]]:
        """The loops with loads, of those without such a loop in it."""
        loading = {loop for loop in self.loops if self.within(loop, "LDG")}
        return sorted(
            x for x in loading if not any(x[0] <= a and b <= x[1] for a, b in loading - {x})
        )

    def local_in_loop(self) -> int:
        """Accesses to local memory in the loop that loads most."""
        inner = self.loading_loops()
        hot = max(inner, key=lambda loop: self.within(loop, "LDG")) if inner else (1, 0)
        return self.within(hot, "local")

    def describe(self) -> Iterator[str]:
        """What it uses, and each of its loops that load."""
        yield (
            f"{self}: {self.registers} registers, {self.blocks} blocks, {self.stack} bytes of stack, "
            f"{self.instructions} instructions"
        )
        for loop in self.loading_loops():
            size = (loop[1] - loop[0]) // INSTRUCTION_BYTES + 1
            loads, wide = self.within(loop, "LDG"), self.within(loop, "wide")
            yield f"    loop at {loop[0]:#06x}: {size} instructions, {loads} loads, {wide} of 16 bytes"


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
        raise FileNotFoundError(MISSING)
    path = os.pathsep.join([str(Path(tool).parent), os.environ["PATH"]])
    command, environment = [tool, *options, str(binary)], os.environ | {"PATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = False
        for line in process.stdout:
            said = True
            yield line
    assert process.returncode == 0 or not said, process.returncode


def kernels_of(binary: Path, arch: str = "") -> list[Kernel]:
    """All kernels in a library, or in a cubin for `arch`."""
    kernels = {}
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
            elif line.lstrip().startswith("/*") and " ;" in line:
                kernel.instructions += 1
                if re.search("LD|ST|RED|ATOM|BRA", line):
                    kernel.read(line)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, sorted({arch for arch, _ in kernels})))
    return list(kernels.values())


def compiled(source: Path, arch: str, folder: str) -> Path:
    """The cubin of one file, with the options that change its code as CMake gives them."""
    cubin = Path(folder) / f"{source.stem}.cubin"
    include = [f"-I{ROOT / folder}" for folder in (".", "ops", "cuda")]
    command = ["nvcc", "-cubin", f"-arch={arch}", "-std=c++17", "-O3", "-DNDEBUG", *include]
    subprocess.run([*command, "-o", str(cubin), str(source)], check=True)
    return cubin


def main(op: str = "", arch: str = "sm_90") -> None:
    """Print what is known of the kernels of an operator."""
    sources = sorted({*ROOT.glob(f"cuda/{op}.cu"), *ROOT.glob(f"cuda/{op}_*.cu")})
    if not op or not sources:
        sys.exit(
            f"sass: there is no cuda/{op}.cu, expected the name of an operator: make sass OP=simreg"
        )
    if shutil.which("nvcc") is None:
        sys.exit("sass: nvcc is missing: install the CUDA toolkit")
    if disassembler() is None:
        sys.exit(f"sass: {MISSING}")
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            for kernel in sorted(kernels_of(compiled(source, arch, folder), arch), key=str):
                print("\n".join(kernel.describe()))


if __name__ == "__main__":
    main(*sys.argv[1:])
