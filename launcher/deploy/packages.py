"""What an image installs: this program as a wheel, and the packages that run here."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launcher.config.folders import conf_folder
from launcher.errors import EnvironmentProblem

PROGRAM = "launcher"
_CHOSEN_BY_TORCH = re.compile(r"nvidia-.*|cuda-.*|triton|pytorch-triton.*")
"""Packages that come with a build of torch; another build has others."""
_MADE = (1980, 1, 1, 0, 0, 0)
"""Time of every file in the wheel, so that equal sources give equal bytes."""


@dataclass(frozen=True, kw_only=True, order=True)
class Package:
    """One package, as it is installed here."""

    name: str
    version: str
    """Without the part that names a build (``2.9.1``, not ``2.9.1+cpu``)."""
    license: str

    @property
    def pin(self) -> str:
        """A line of a requirements file."""
        return f"{self.name}=={self.version}"


def needed_packages(extras: Iterable[str]) -> list[Package]:
    """Return every package that this program needs with these extras, by name.

    Raises:
        EnvironmentProblem: one of them is not installed here.
    """
    found: dict[str, Package] = {}
    unvisited = [(PROGRAM, frozenset({"", *extras}))]
    visited = set()
    while unvisited:
        name, wanted = unvisited.pop()
        if (name, wanted) in visited:
            continue
        visited.add((name, wanted))
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            why = f"{name} is not installed, so its version cannot be given to the image"
            raise EnvironmentProblem(f"{why}: pip install '{PROGRAM}[{','.join(sorted(wanted - {''}))}]'") from error
        if name != PROGRAM:
            version = installed.version.partition("+")[0]
            found[name] = Package(name=name, version=version, license=_license(installed))
        unvisited += _requirements(installed, wanted)
    return sorted(found.values())


def _requirements(
    installed: importlib.metadata.Distribution, extras: frozenset[str]
) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield name and extras of what a package needs on this kind of machine."""
    for line in installed.requires or []:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        is_needed = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
        if is_needed and not _CHOSEN_BY_TORCH.fullmatch(name):
            yield name, frozenset({"", *requirement.extras})


def _license(installed: importlib.metadata.Distribution) -> str:
    tree: Any = installed.metadata
    classifiers = [each for each in tree.get_all("Classifier") or [] if each.startswith("License ::")]
    short = tree.get("License") or ""
    found = tree.get("License-Expression") or (short if 0 < len(short) < 60 else "")
    return found or (classifiers[0].rpartition(" :: ")[2] if classifiers else "unknown")


def bill_of_materials(packages: Iterable[Package], *, version: str) -> dict[str, Any]:
    """Return the packages as a CycloneDX 1.6 document.

    Source: https://cyclonedx.org/docs/1.6/json/

    Args:
        packages: in the image.
        version: of this program.
    """

    def component(name: str, version: str, license_name: str) -> dict[str, Any]:
        return {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": name,
            "version": version,
            "licenses": [{"license": {"name": license_name}}],
            "purl": f"pkg:pypi/{name}@{version}",
        }

    program = component(PROGRAM, version, "Apache-2.0")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**program, "type": "application"}},
        "components": [component(each.name, each.version, each.license) for each in packages],
    }


def program_wheel() -> tuple[str, bytes]:
    """Return file name and bytes of this program as a wheel, made of the files that run here.

    Equal files give equal bytes.
    """
    installed = importlib.metadata.distribution(PROGRAM)
    package = Path(__file__).parent.parent
    files = dict(_files(package, PROGRAM))
    files.update(_files(conf_folder(), f"{PROGRAM}/conf"))
    folder = f"{PROGRAM}-{installed.version}.dist-info"
    for name in ("METADATA", "entry_points.txt"):
        files[f"{folder}/{name}"] = (installed.read_text(name) or "").encode()
    files[f"{folder}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: {PROGRAM}\nRoot-Is-Purelib: true\nTag: py3-none-any\n".encode()
    )
    record = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in sorted(files.items())]
    files[f"{folder}/RECORD"] = "\n".join([*record, f"{folder}/RECORD,,", ""]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in sorted(files.items()):
            entry = zipfile.ZipInfo(path, date_time=_MADE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, data)
    return f"{PROGRAM}-{installed.version}-py3-none-any.whl", buffer.getvalue()


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
            yield "/".join((prefix, *parts)), path.read_bytes()


def _digest(data: bytes) -> str:
    """Return a SHA-256 as ``RECORD`` has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
