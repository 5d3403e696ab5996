"""Talking to the probes of all hosts at once, in one thread, however many there are."""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from launcher.doctor.channel import Channel
from launcher.open_files import room_for_files
from launcher.plan import Host
from launcher.remote.command import Remote

MODULE = "launcher.doctor.probe"
_FAREWELL_S = 1.0
"""Time for probes to end by themselves once their stdin has ended."""
_FILES_PER_HOST = 3
_FILES_OF_OURS = 64

_WRITE, _READ, _COMPLAIN = "write", "read", "complain"


class Conversation:
    """Opens one channel a host, and ends all of them when the ``with`` block ends."""

    def __init__(self, hosts: Sequence[Host], remote: Callable[[Host, str], Remote]) -> None:
        self._hosts, self._remote = hosts, remote
        self.channels: dict[str, Channel] = {}
        self.not_started: dict[str, str] = {}
        """Why there is no channel, by host."""
        self._cleanup = contextlib.ExitStack()
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Conversation:
        with contextlib.ExitStack() as undo:
            undo.enter_context(room_for_files(_FILES_PER_HOST * len(self._hosts) + _FILES_OF_OURS))
            undo.callback(self._end)
            for host in self._hosts:
                self._open(host)
                self._serve(0.0)  # the first ones need not wait until a thousand are started
            self._cleanup = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def ask(self, name: str, question: dict[str, Any]) -> None:
        """Send a question to one host; one that is gone never answers."""
        channel = self.channels[name]
        if channel.is_open:
            channel.ask(question)
            self._watch_stdin(channel)

    def collect(self, kind: str, names: Iterable[str], *, until: float) -> dict[str, dict[str, Any]]:
        """Return the answers of a kind, by host, without those that are gone or silent until ``until`` (monotonic)."""
        waiting = {name for name in names if name in self.channels}
        answers: dict[str, dict[str, Any]] = {}
        changed = {self.channels[name] for name in waiting}
        while True:
            for channel in changed:
                found = next((message for message in channel.messages if message["doctor"] == kind), None)
                if found is not None and channel.name in waiting:
                    answers[channel.name] = found
                if found is not None or not channel.is_open:
                    waiting.discard(channel.name)
            left = until - time.monotonic()
            if not waiting or left <= 0:
                return answers
            changed = self._serve(left)

    def told(self, name: str, kind: str) -> Iterator[dict[str, Any]]:
        """Yield every message of a kind that has come from a host."""
        return (message for message in self.channels[name].messages if message["doctor"] == kind)

    def _open(self, host: Host) -> None:
        try:
            channel = Channel(host.name, self._remote(host, MODULE))
        except OSError as error:
            self.not_started[host.name] = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            return
        self.channels[host.name] = channel
        self._selector.register(channel.stdout, selectors.EVENT_READ, (_READ, channel))
        self._selector.register(channel.stderr, selectors.EVENT_READ, (_COMPLAIN, channel))
        self._watch_stdin(channel)

    def _watch_stdin(self, channel: Channel) -> None:
        if channel.has_unsent and channel.stdin not in self._selector.get_map():
            self._selector.register(channel.stdin, selectors.EVENT_WRITE, (_WRITE, channel))

    def _serve(self, timeout_s: float) -> set[Channel]:
        """Move what can be moved, wait for the first of it, and return whose it was."""
        changed = set()
        for key, _ in self._selector.select(timeout_s):
            does, channel = key.data
            changed.add(channel)
            if does == _WRITE:
                channel.write()
                goes_on = channel.has_unsent
            else:
                goes_on = channel.read() if does == _READ else channel.read_complaints()
            if not goes_on:
                self._selector.unregister(key.fileobj)
        return changed

    def _end(self) -> None:
        for channel in self.channels.values():
            if channel.stdin in self._selector.get_map():
                self._selector.unregister(channel.stdin)
            channel.hang_up()
        answered = [channel for channel in self.channels.values() if channel.messages]  # the others have nothing to end
        ends = time.monotonic() + _FAREWELL_S
        while any(channel.is_open for channel in answered) and (left := ends - time.monotonic()) > 0:
            self._serve(left)
        self._selector.close()
        for channel in self.channels.values():
            channel.end()
