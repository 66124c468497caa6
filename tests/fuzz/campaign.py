"""Look for inputs that break the C functions: ``make fuzz MINUTES=10``.

Builds the fuzzer with clang, runs it from the committed corpus, keeps the smallest set of inputs
that reaches as much, and prints the coverage of ``ops/core``. An input that fails is left in
``build/fuzz``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "fuzz"
CORPUS = ROOT / "tests" / "fuzz" / "corpus.txt"  # a line of hexadecimal bytes for each input
CLANG = os.environ.get("CLANG", "clang-14")


def run(*command: object, **environment: str) -> None:
    """A command in the build folder; ends the program where it fails."""
    done = subprocess.run([str(x) for x in command], cwd=FOLDER, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{command[0]} ends with {done.returncode}; see {FOLDER}")


def build() -> None:
    """The fuzzer, and the program that replays a corpus, both with coverage."""
    if not shutil.which(CLANG):
        sys.exit(
            f"no {CLANG} (Debian, Ubuntu: apt-get install clang-14 libclang-rt-14-dev llvm-14)"
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    sanitizers = "address,undefined,fuzzer-no-link"
    run("cmake", "-S", ROOT, "-B", FOLDER, f"-DCMAKE_C_COMPILER={CLANG}", "-DSELFKD_CUDA=OFF",
        f"-DSELFKD_SANITIZE={sanitizers}")  # fmt: skip
    run("cmake", "--build", FOLDER, "--parallel", "2", "--target", "fuzz", "replay")


def unpack(lines: list[str], folder: Path) -> None:
    """A file for each input, as libFuzzer wants them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, line in enumerate(lines):
        (folder / f"{number:05}").write_bytes(bytes.fromhex(line))


def pack(folder: Path) -> None:
    """The corpus from a folder of files."""
    inputs = sorted((path.read_bytes() for path in folder.iterdir()), key=lambda x: (len(x), x))
    CORPUS.write_text("".join(f"{x.hex()}\n" for x in inputs))
    print(f"{CORPUS.name}: {len(inputs)} inputs, {CORPUS.stat().st_size / 1024:.0f} KB", flush=True)


def report() -> None:
    """Line coverage of the corpus, and how many of its inputs reach a kernel."""
    version = CLANG.removeprefix("clang")
    replay = FOLDER / "tests" / "fuzz" / "replay"
    run(replay, CORPUS, LLVM_PROFILE_FILE="replay.profraw")
    run(f"llvm-profdata{version}", "merge", "replay.profraw", "-o", "replay.profdata")
    # the paths in the program are relative to ROOT (-ffile-prefix-map in CMakeLists.txt)
    paths = (f"-compilation-dir={ROOT}", ROOT / "ops/core")
    run(f"llvm-cov{version}", "report", replay, "-instr-profile=replay.profdata", *paths)


def main(minutes: float) -> None:
    """One campaign."""
    build()
    found, least = FOLDER / "corpus", FOLDER / "least"
    unpack(CORPUS.read_text().split() if CORPUS.exists() else [], found)
    fuzz, limits = FOLDER / "tests" / "fuzz" / "fuzz", ("-len_control=0", "-max_len=256")
    quiet = {"LLVM_PROFILE_FILE": os.devnull}
    if minutes:
        run(fuzz, f"-max_total_time={60 * minutes:.0f}", "-timeout=20", *limits, found, **quiet)
    unpack([], least)
    run(fuzz, "-merge=1", *limits, least, found, **quiet)
    pack(least)
    report()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10)
