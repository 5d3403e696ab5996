"""One engine as the front sees it: a process of its own behind a link, with the requests that are on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from launcher.serving.frames import (
    LENGTH,
    MAX_BYTES,
    Message,
    pack,
    request_to_wire,
    stats_from_wire,
    unpack,
    update_from_wire,
)
from launcher.serving.front.flight import Flight
from launcher.serving.values import Stats
from launcher.supervise.processes import Process, identify

_BROKE = "its link broke"
_ENDING_S = 3.0
"""Time that an engine gets to end once it is told to."""


class Remote:
    """An engine behind a connection.

    Args:
        number: which of the engines.
        connection: this end of the socket pair.
        process: what is at the other end, where it is a child of this process.
        on_ready: called when it can be given requests.
        on_lost: called when it is gone, with why.
    """

    def __init__(
        self,
        number: int,
        connection: socket.socket,
        *,
        process: subprocess.Popen[bytes] | None,
        on_ready: Callable[[Remote], None],
        on_lost: Callable[[Remote, str], None],
    ) -> None:
        self.number, self._connection, self._popen = number, connection, process
        self.process: Process | None = identify(process.pid) if process else None
        self._on_ready, self._on_lost = on_ready, on_lost
        self.flights: dict[str, Flight] = {}
        self.stats = Stats()
        self.context: int | None = None
        """Most tokens of a sequence; known once it is ready."""
        self.failure: Message | None = None
        """Why it could not be built, in its own words."""
        self.phase = "start"
        self.started_at = self.heard_at = time.monotonic()
        self._progress_at = self.heard_at
        self._is_ending = False
        self._writer: asyncio.StreamWriter | None = None
        self._task = asyncio.get_running_loop().create_task(self._serve())

    @property
    def is_ready(self) -> bool:
        """Whether it can be given requests."""
        return self.context is not None and self._writer is not None

    @property
    def stuck_s(self) -> float:
        """For how long it has had something to do and done nothing; before it is ready, for how long it is silent."""
        return time.monotonic() - (self._progress_at if self.is_ready else self.heard_at)

    def give(self, flight: Flight) -> None:
        """Hand it a request."""
        now = time.monotonic()
        if not self.flights:
            self._progress_at = now
        flight.lives += 1
        self.flights[flight.request.id] = flight
        waited, request = now - flight.times.arrived, flight.request
        # whoever was begun by an engine that died has waited its turn already
        in_queue_s = None if flight.times.begun is not None else _left(request.queue_deadline_s, waited)
        self._send(
            {
                "kind": "add",
                "request": request_to_wire(
                    replace(
                        request,
                        queue_deadline_s=in_queue_s,
                        deadline_s=_left(request.deadline_s, waited),
                    )
                ),
            }
        )

    def cancel(self, flight: Flight) -> None:
        """Have it let go of a request, before its next step."""
        if self.flights.pop(flight.request.id, None) is not None:
            self._send({"kind": "cancel", "request": flight.request.id})

    def kill(self) -> None:
        """End it at once; ``on_lost`` follows."""
        if self.process is not None:
            self.process.send(signal.SIGKILL)

    async def end(self) -> None:
        """Let it end in peace, and see that it does."""
        self._is_ending = True
        self._send({"kind": "end"})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._task), _ENDING_S)
        self.kill()
        await self._task

    async def _serve(self) -> None:
        """Read what it says until it is gone."""
        reader, self._writer = await asyncio.open_connection(sock=self._connection, limit=1 << 20)
        why = _BROKE
        try:
            while True:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                if length > MAX_BYTES:
                    why = f"it sent a frame of {length} bytes"
                    break
                self._hear(unpack(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception as error:  # noqa: BLE001  (whoever talks nonsense is as lost as who says nothing)
            why = f"it sent what nobody understands ({error!r})"
        finally:
            self._writer.close()
            self._writer = None
        if self._popen is not None:
            if not self._is_ending:
                self.kill()
            code = await asyncio.to_thread(self._popen.wait)
            if why == _BROKE:
                how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
                why = f"it ended {how}"
        if not self._is_ending:
            self._on_lost(self, why)

    def _hear(self, message: Message) -> None:
        self.heard_at = time.monotonic()
        match message["kind"]:
            case "step":
                self._progress_at = self.heard_at
                self.stats = stats_from_wire(message["stats"])
                for row in message["updates"]:
                    update = update_from_wire(row)
                    flight = self.flights.get(update.request)
                    if flight is None:  # cancelled meanwhile
                        continue
                    if update.finish is not None:
                        del self.flights[update.request]
                    flight.hear(update)
            case "refused":
                if flight := self.flights.pop(message["request"], None):
                    flight.refuse(message["field"], message["why"])
            case "ready":
                self.context = message["context"]
                self._progress_at = self.heard_at
                self._on_ready(self)
            case "beat":
                self.phase = message["phase"]
            case "failed":
                self.failure = message
            case kind:
                raise AssertionError(f"no engine says {kind}")

    def _send(self, message: Message) -> None:
        if self._writer is not None:  # else it is lost, and whoever asks is told so in a moment
            self._writer.write(pack(message))


def start_replica(
    run_dir: Path, number: int, *, environ: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start an engine's process; return it and this end of its link. Call it in the main thread, which it dies with."""
    ours, theirs = socket.socketpair()
    with theirs:
        words = (str(run_dir), str(number), str(theirs.fileno()), str(os.getpid()))
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.serving.replica", *words],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    ours.setblocking(False)
    return process, ours


def _left(deadline_s: float | None, waited_s: float) -> float | None:
    return None if deadline_s is None else max(0.001, deadline_s - waited_s)
