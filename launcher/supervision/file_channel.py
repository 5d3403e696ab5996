"""File channel between rank monitors and an agent elsewhere: files in the run directory.

Other people's launchers start ranks on other machines without an agent beside them. What both sides share then is the
run directory. The agent renews ``agent.json`` every second, with the signals that it wants sent; each rank monitor
renews ``rank<k>.json``, with what its rank says and how it ends. A side whose number does not change any more is gone.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.protocol.heartbeat import HEARTBEAT_BYTES, read_heartbeat
from launcher.protocol.rundir import RunDir
from launcher.protocol.wire import require_fields

RENEW_S = 1.0
"""Time between two signs of life."""

AGENT_FIELDS: dict[str, Any] = {"token": str, "turn": int, "signals": list[int], "over": bool}
START_FIELDS: dict[str, Any] = {"token": str, "cwd": str, "env": dict[str, str]}
RANK_FIELDS: dict[str, Any] = {"token": str, "turn": int, "age_s": float, "heartbeat": dict[str, Any] | None}


def channel_folder(run_dir: RunDir) -> Path:
    """Return the folder."""
    return run_dir.path / "board"


def agent_file(board: Path) -> Path:
    """Return what the agent writes: ``token`` of this start, ``turn``, ``signals`` so far, ``over``."""
    return board / "agent.json"


def rank_file(board: Path, rank: int) -> Path:
    """Return what a guard writes: ``token``, ``turn``, ``guard``, ``pid``, ``heartbeat``; in the end ``status``."""
    return board / f"rank{rank}.json"


def write_channel_file(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file as a whole; unlike a file that must survive a power cut, it need not reach the disk."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def read_channel_file(path: Path, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a file says; ``None`` when it cannot be read, now or at all.

    Args:
        path: of the file.
        fields: that it must have, with their types; a file of another form counts as unreadable.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            return None
        require_fields(content, fields)
    except (OSError, ValueError, RecursionError):
        return None
    return content


def mark_run_over(run_dir: RunDir) -> None:
    """Say that the run is over, in the place of an agent that may not have come to it."""
    orders = read_channel_file(agent_file(channel_folder(run_dir)), AGENT_FIELDS)
    if orders is not None and not orders["over"]:
        with contextlib.suppress(OSError):  # then the guards end their ranks because they hear nothing
            write_channel_file(agent_file(channel_folder(run_dir)), {**orders, "over": True})


class Lease:
    """Notices that a number has not changed for ``timeout_s``; clocks of other machines play no part."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._seen, self._at = timeout_s, -1, time.monotonic()

    def renew(self, turn: int) -> None:
        """Take the number as it is now."""
        if turn != self._seen:
            self._seen, self._at = turn, time.monotonic()

    @property
    def silent_s(self) -> float:
        """Time since it last changed."""
        return time.monotonic() - self._at

    @property
    def is_over(self) -> bool:
        """Whether that is too long."""
        return self.silent_s > self._timeout_s


class FileChannel:
    """A guard's side; takes the place of ``Link``.

    Args:
        board: the folder.
        rank: whose guard it is.
        token: of the start that this rank belongs to.
        timeout_s: silence of the agent after which it counts as gone.
    """

    def __init__(self, board: Path, *, rank: int, token: str, timeout_s: float) -> None:
        self.beats = mmap.mmap(-1, HEARTBEAT_BYTES)
        """Shared with the rank, which is forked from this process."""
        self._board, self._rank, self._token = board, rank, token
        self._parent, self._lease = os.getppid(), Lease(timeout_s)
        self._said: dict[str, Any] = {}
        self._turn = self._num_obeyed = 0
        self._next_at = 0.0
        self._is_over = False

    def tell(self, *, kind: str, **message: Any) -> None:
        """Post what a guard has to say."""
        self._said.update(message)
        self._post()

    def orders(self) -> list[int]:
        """Return the signals that the agent wants sent and were not returned yet; show that this guard lives."""
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + RENEW_S
            self._post()
        told = read_channel_file(agent_file(self._board), AGENT_FIELDS)
        if told is None:
            return []
        self._is_over = told["over"] or told["token"] != self._token
        self._lease.renew(told["turn"])
        new: list[int] = told["signals"][self._num_obeyed :] if not self._is_over else []
        self._num_obeyed += len(new)
        return new

    def lost(self) -> bool:
        """Return whether the run is over, its agent silent, or what started this rank gone."""
        if os.getppid() != self._parent:
            self._said["is_orphan"] = True
        return self._is_over or self._lease.is_over or "is_orphan" in self._said

    def clean_up_after_agent(self) -> None:
        """Leave the folder: others read it, and it is the run's."""

    def close(self) -> None:
        """Leave the rank's half nothing to do."""

    def _post(self) -> None:
        self._turn += 1
        heartbeat, now = read_heartbeat(self.beats), time.monotonic()
        shown = heartbeat and {
            "phase": heartbeat.phase,
            "step": heartbeat.step,
            "at": heartbeat.at,
            "numbers": heartbeat.numbers,
        }
        age_s = max(0.0, now - heartbeat.at) if heartbeat else 0.0
        content = {"token": self._token, "turn": self._turn, "heartbeat": shown, "age_s": age_s, **self._said}
        with contextlib.suppress(OSError):  # a full or absent disk: the agent will notice the silence
            write_channel_file(rank_file(self._board, self._rank), content)
