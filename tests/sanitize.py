"""The whole test-suite over a library with AddressSanitizer and UBSan: ``make sanitize``.

Then the C tests: under them with a search for leaks, and under valgrind where there is one. Takes an
hour; arguments go to pytest. (The CUDA kernels always run under them, in the emulator.)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from test_simt import sanitizer_environment

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitize"
PLAIN = ROOT / "build" / "valgrind"
PROGRAMS = ("test_core", "test_kl", "test_philox", "c_program")
# What these ask of the library does not hold for one that is linked with sanitizers, the C programs
# run here, and neither nvcc nor an allocator that refuses runs beside AddressSanitizer.
NOT = (
    "not needs_only_libc and not is_hardened and not from_c and not test_c_program "
    "and not in_the_emulator and not what_is_wrong_is_found and not cannot_be_allocated"
)


def run(*command: object, **environment: str) -> bool:
    """Whether a command succeeds."""
    print(*command, flush=True)
    return subprocess.run([str(x) for x in command], env=os.environ | environment).returncode == 0


def build(folder: Path, sanitizers: str) -> bool:
    """The library and the C programs."""
    options = ["-DSELFKD_CUDA=OFF", f"-DSELFKD_SANITIZE={sanitizers}"]
    return run("cmake", "-S", ROOT, "-B", folder, *options) and run(
        "cmake", "--build", folder, "--parallel", "2", "--target", "selfkd", *PROGRAMS
    )


def main() -> int:
    """1 where anything failed."""
    passed = [build(FOLDER, "address,undefined")]
    for program in PROGRAMS:
        passed.append(run(FOLDER / "tests" / program, ASAN_OPTIONS="detect_leaks=1"))
    if shutil.which("valgrind"):
        passed.append(build(PLAIN, ""))
        for program in PROGRAMS:
            valgrind = ("valgrind", "--quiet", "--error-exitcode=1", "--leak-check=full")
            # the threads of the pool stay until the process ends
            command = (*valgrind, "--errors-for-leak-kinds=definite", PLAIN / "tests" / program)
            passed.append(run(*command, SELFKD_TEST_REPEATS="10"))
    else:
        print("no valgrind (Debian, Ubuntu: apt-get install valgrind): the C tests run without it")
    library = {"SELFKD_LIBRARY": str(FOLDER / "libselfkd.so"), "OMP_NUM_THREADS": "1"}
    suite = ("-m", "pytest", "-p", "no:cacheprovider", "-k", NOT, *sys.argv[1:])
    passed.append(run(sys.executable, *suite, **library, **sanitizer_environment()))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
