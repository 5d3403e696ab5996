"""What came of building each operator, kept beside it so that ranks can say why they do without one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one build."""

    name: str
    built: bool
    seconds: float
    why: str = ""
    """Why it could not be built."""
    remedy: str = ""
    """What to type so that it can."""


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Keep an outcome."""
    write_json(_path(folder, outcome.name), asdict(outcome))


def read_outcome(folder: Path, name: str) -> Outcome | None:
    """Return the last outcome, or ``None`` when nobody built this operator here."""
    path = _path(folder, name)
    return Outcome(**read_json(path)) if path.exists() else None
