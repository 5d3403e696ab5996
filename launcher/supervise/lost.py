"""Why a host is lost: the failure to report when its agent is gone though nobody told it to go."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.supervise.failure import Failure, ended_how, exit_code_of
from launcher.supervise.messages import AgentGone


def agent_ended(host: str, gone: AgentGone, *, log: Path, tail: str) -> Failure:
    """Return the failure of an agent whose end was seen: by its warden, or as our own child."""
    reason = f"the host agent on {host} {ended_how(gone.code, gone.signal)}"
    code = exit_code_of(gone.code, gone.signal) or 1
    return _failure(host, reason, log=log, tail=tail, code=code, signal=gone.signal)


def connection_ended(host: str, *, program: str | None, code: int, log: Path, tail: str) -> Failure:
    """Return the failure of a connection that broke off.

    Args:
        host: where it led.
        program: what made it (``ssh``); ``None`` for a bare socket.
        code: how that ended, negative for a signal.
        log: holds what it said.
        tail: the end of it.
    """
    last = tail.strip().rpartition("\n")[2]
    how = ended_how(code, None) if code >= 0 else ended_how(None, -code)
    what = f"{program} {how}" if program else "its agent was killed, or hung up"
    reason = f"the connection to {host} was lost: {what}{f', saying: {last}' if last else ''}"
    return _failure(host, reason, log=log, tail=tail)


def silent(host: str, *, for_s: float, was_up: bool, log: Path, tail: str) -> Failure:
    """Return the failure of a host that is not heard of."""
    if was_up:
        what = f"nothing was heard of {host} for {for_s:.0f} s: it is down, frozen, or cut off from here"
        reason = f"{what}; what runs there ends by itself when it hears nothing of us"
    else:
        reason = f"the host agent on {host} did not answer within {for_s:.0f} s"
    return _failure(host, reason, log=log, tail=tail)


def malformed(host: str, what: str, *, log: Path, tail: str) -> Failure:
    """Return the failure of an agent that sent what is no message."""
    reason = f"the connection to {host} was closed: its agent sent {what}"
    return _failure(host, reason, log=log, tail=tail)


def _failure(host: str, reason: str, *, log: Path, tail: str, code: int = 1, signal: int | None = None) -> Failure:
    return Failure(
        host=host,
        rank=None,
        exit_code=code,
        signal=signal,
        reason=reason,
        traceback=tail,
        log=str(log),
        time=time.time(),
    )
