"""Environment of a rank, and the files in which it records its exception."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from launcher.errors import EnvironmentProblem
from launcher.protocol.rundir import RunDir


class ExceptionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The exception that ends a rank."""

    pid: int
    time: float
    code: int
    """Exit code that the rank will return."""
    error: str
    """Type and message."""
    traceback: str


@dataclass(frozen=True, kw_only=True)
class RankEnv:
    """Identity of this rank, from its environment."""

    run_dir: RunDir
    rank: int
    local_rank: int
    world_size: int
    host: str
    """The name of this machine in the plan."""
    run_hash: str | None
    """Expected hash of the snapshot."""
    run_id: str
    """Empty for a rank that was started by hand."""
    scratch: Path | None
    """Folder of the agent's socket and heartbeat files; ``None`` for a rank started by hand."""

    @property
    def log(self) -> Path:
        """Log of everything that this rank prints."""
        return self.run_dir.log_of(self.host, self.rank)

    @property
    def record(self) -> Path:
        """File in which this rank records the exception that ends it."""
        return exception_record_file(self.run_dir, self.rank)


def exception_text_file(run_dir: RunDir, rank: int) -> Path:
    """Return the file of the text that a rank prints when it fails."""
    return exception_record_file(run_dir, rank).with_suffix(".txt")


def exception_record_file(run_dir: RunDir, rank: int) -> Path:
    """Return the file that holds the exception of ``rank``."""
    return run_dir.logs / f"failure.rank{rank}.json"


def read_rank_env(run_dir: Path, environ: Mapping[str, str]) -> RankEnv:
    """Return the identity of a rank from ``environ``.

    Raises:
        EnvironmentProblem: RANK, LOCAL_RANK, WORLD_SIZE or LAUNCHER_HOST is missing or not a number.
    """
    try:
        return RankEnv(
            run_dir=RunDir(run_dir),
            rank=int(environ["RANK"]),
            local_rank=int(environ["LOCAL_RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            host=environ["LAUNCHER_HOST"],
            run_hash=environ.get("LAUNCHER_RUN_HASH"),
            run_id=environ.get("LAUNCHER_RUN_ID", ""),
            scratch=Path(environ["LAUNCHER_AGENT_SCRATCH"]) if "LAUNCHER_AGENT_SCRATCH" in environ else None,
        )
    except (KeyError, ValueError) as error:
        message = f"ranks are started by `python -m launcher`, which sets RANK, WORLD_SIZE and more ({error})"
        raise EnvironmentProblem(message) from error
