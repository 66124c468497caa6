"""Lays out a kernel for the Hugging Face Hub: ``python bindings/hub.py WHEEL FOLDER``.

The kernel is the package of a wheel without CUDA, less what is for a command line or for toolkits. Its name
as a package, and so the namespace of its operators, is the ``id`` in ``metadata.json``. That is made of what
the files hold, so that two builds differ.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import zipfile
from pathlib import Path

LEFT_OUT = {
    "__main__.py",
    "bench",
    "check.py",
    "check_torch.py",
    "cli.py",
    "include",
    "integrations",
}
# The release whose C functions the library needs; `kernels` takes it for every later one too.
FRAMEWORK = "torch-stable-abi28"


def lay_out(wheel: Path, folder: Path) -> Path:
    """Write the folder of the wheel's processor; returns it."""
    machine = next(x for x in ("x86_64", "aarch64") if wheel.stem.endswith(x))
    variant = folder / "build" / f"{FRAMEWORK}-cpu-{machine}-linux"
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            package, _, path = name.partition("/")
            if package != "selfkd" or path.split("/")[0] in LEFT_OUT:
                continue
            data = archive.read(name)
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_bytes(data)
            files[path] = base64.b64encode(hashlib.sha256(data).digest()).decode()
    unique = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    metadata = {
        "name": "selfkd",
        "id": f"_selfkd_cpu_{unique}",
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


if __name__ == "__main__":
    print(lay_out(*map(Path, sys.argv[1:])))
