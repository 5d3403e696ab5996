"""One call of an OpenAI-compatible server, from the request to the last event of its stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.benchmarks.load.calls import Call
from launcher.benchmarks.load.http import Address, Answer, Connection, Trouble
from launcher.benchmarks.load.outcome import Outcome

_SHOWN = 300


@dataclass(frozen=True, kw_only=True)
class Target:
    """Whom to ask, and how."""

    address: Address
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that every body gets, unless the call has its own."""
    key: str = ""
    """API key; empty sends none."""
    timeout_s: float = 600.0
    """Of a whole call."""
    keep_text: bool = False
    """Whether outcomes hold what was answered."""

    def connection(self) -> Connection:
        """Return a new one, not open yet."""
        return Connection(self.address, headers={"Authorization": f"Bearer {self.key}"} if self.key else {})

    def request(self, call: Call) -> tuple[str, bytes]:
        """Return the path and the body of a call."""
        path = "/v1/chat/completions" if "messages" in call.fields else "/v1/completions"
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            **self.extra,
            **call.fields,
        }
        return path, json.dumps({name: value for name, value in body.items() if value is not None}).encode()


class Pool:
    """Connections that rest between calls: as many are open as calls are under way."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._resting: list[Connection] = []

    def take(self) -> Connection:
        """Return one that rests, or a new one."""
        return self._resting.pop() if self._resting else self.target.connection()

    def give(self, connection: Connection) -> None:
        """Let one rest."""
        self._resting.append(connection)

    def close(self) -> None:
        """Close those that rest."""
        for connection in self._resting:
            connection.close()


async def carry_out(call: Call, outcome: Outcome, pool: Pool, *, start: float) -> Outcome:
    """Send a call and fill in its outcome; a call that is cancelled ends like one whose client is gone.

    Args:
        call: what to ask.
        outcome: with its number and when it was due.
        pool: of connections.
        start: ``time.perf_counter()`` at the start of the load.
    """
    connection, answer = pool.take(), None
    path, body = pool.target.request(call)
    outcome.sent_s = time.perf_counter() - start
    try:
        async with asyncio.timeout(pool.target.timeout_s):
            answer = await connection.post(path, body)
            await _read(answer, outcome, start=start, keep_text=pool.target.keep_text)
    except Trouble as trouble:
        outcome.error, outcome.why = trouble.kind, str(trouble)
    except TimeoutError:
        outcome.error, outcome.why = "timeout", f"no whole answer after {pool.target.timeout_s:g} s"
    except asyncio.CancelledError:
        outcome.error = "unfinished"
        raise
    finally:
        outcome.end_s = time.perf_counter() - start
        if answer is not None and answer.keeps:
            pool.give(connection)
        else:
            connection.close()
    return outcome


async def _read(answer: Answer, outcome: Outcome, *, start: float, keep_text: bool) -> None:
    if answer.status != 200:
        raise Trouble(str(answer.status), (await answer.body())[:_SHOWN].decode(errors="replace"))
    async for event in _events(answer):
        _take(event, outcome, now=time.perf_counter() - start, keep_text=keep_text)
    if not outcome.finish:
        raise Trouble("cut", "the answer ended without a reason to finish")


async def _events(answer: Answer) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of each event of a stream, or of an answer that is none: some servers name the wrong type.

    Comments, and the word that ends a stream, are passed over.
    """
    rest, plain, streams = b"", b"", False
    async for piece in answer.pieces():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                streams = True
                if not (data := line[5:].strip()).startswith(b"[DONE]"):
                    yield _object(data)
            elif not streams:
                plain += line + b"\n"
    if not streams:
        yield _object(plain + rest)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise Trouble("frame", f"no JSON: {data[:_SHOWN]!r}") from error
    if not isinstance(found, dict) or "error" in found:
        raise Trouble("frame", data[:_SHOWN].decode(errors="replace"))
    return found


def _take(event: dict[str, Any], outcome: Outcome, *, now: float, keep_text: bool) -> None:
    """Note what an event, or a whole answer, says."""
    for choice in event.get("choices") or ():
        said = choice.get("delta") or choice.get("message") or choice
        text = said.get("content") or said.get("text") or ""
        if text:
            outcome.chunks_s.append(now)
            outcome.tokens += 1
            if keep_text:
                outcome.text += text
        outcome.finish = choice.get("finish_reason") or outcome.finish
    if usage := event.get("usage"):
        outcome.prompt_tokens = usage.get("prompt_tokens", 0)
        outcome.tokens = usage.get("completion_tokens", outcome.tokens)
