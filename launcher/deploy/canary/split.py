"""What splits requests between two versions: the interface, and the folder's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from launcher.config.deploy.canary import CanaryDeploy
from launcher.config.run import Run
from launcher.config.snapshot import dump_run
from launcher.deploy.canary.progress import Progress
from launcher.deploy.container_run import SNAPSHOT_FILE
from launcher.deploy.folder import update


@dataclass(frozen=True, kw_only=True)
class Live:
    """What is in force now."""

    percent: int
    """Of the requests, that the new version gets."""
    progress: Progress | None
    """What ``launch deploy promote`` wrote last, if it was about this version."""


class Split(Protocol):
    """A route or a load balancer between a baseline and a new version."""

    @property
    def where(self) -> str:
        """Its name, for what is printed."""

    @property
    def version(self) -> str:
        """Identifies the new version."""

    @property
    def canary_matchers(self) -> tuple[str, ...]:
        """Matchers of the new version's series."""

    @property
    def baseline_matchers(self) -> tuple[str, ...]:
        """Matchers of the baseline's series."""

    def check_files(self) -> None:
        """Raise a ConfigError if the user changed a file that holds the weights."""

    def read(self) -> Live:
        """Return what is in force.

        Raises:
            EnvironmentProblem: it cannot be reached, or routes between other versions.
        """

    def write(self, progress: Progress) -> None:
        """Put the weights of ``progress`` in force, and keep it beside them.

        Raises:
            EnvironmentProblem: it cannot be reached, or another client changed it meanwhile.
        """

    def problem(self) -> str | None:
        """Return why the new version cannot serve; ``None`` if it can."""


def with_share(run: Run, percent: int) -> Run:
    """Return a run whose new version has another share."""
    assert isinstance(run.deploy, CanaryDeploy), run.deploy.kind
    return replace(run, deploy=run.deploy.with_canary_share(percent))


def update_folder(folder: Path, run: Run, files: Mapping[str, str]) -> None:
    """Write the snapshot of a run with its new share, and the files that follow from it."""
    update(folder, {SNAPSHOT_FILE: dump_run(run), **files})
