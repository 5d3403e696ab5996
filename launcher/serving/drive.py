"""The loop of an engine's process: what the front asks for goes in, every step's updates go out in one frame."""

from __future__ import annotations

import time
from collections.abc import Callable

from launcher.serving.base import Generator
from launcher.serving.frames import Message, request_from_wire, stats_to_wire, update_to_wire
from launcher.serving.link import EngineLink
from launcher.serving.values import Refused, Update

_IDLE_S = 0.5
"""Longest time without a word to the front, when there is nothing to do."""
_QUIET_S = 0.1
"""The same between steps that bring nothing."""


def drive(generator: Generator, link: EngineLink, *, beat: Callable[[str], None]) -> None:
    """Serve the front until it says ``end``.

    Args:
        generator: warmed up.
        link: to the front.
        beat: called at every turn.

    Raises:
        Gone: the front has ended without saying so.
    """
    link.send({"kind": "ready", "context": generator.context})
    told_at = 0.0
    while True:
        idle = generator.idle
        beat("idle" if idle else "step")
        for message in link.receive(wait_s=_IDLE_S if idle else 0.0):
            if message["kind"] == "end":
                return
            _obey(generator, link, message)
        updates = generator.step()
        now = time.monotonic()
        if updates or now - told_at >= (_IDLE_S if idle else _QUIET_S):
            told_at = now
            rows = [update_to_wire(update) for update in updates]
            link.send({"kind": "step", "updates": rows, "stats": stats_to_wire(generator.stats())})


def _obey(generator: Generator, link: EngineLink, message: Message) -> None:
    match message["kind"]:
        case "add":
            request = request_from_wire(message["request"])
            try:
                generator.add(request)
            except Refused as refusal:
                link.send({"kind": "refused", "request": request.id, "field": refusal.field, "why": str(refusal)})
            except Exception as error:  # noqa: BLE001  (whatever it is, the other requests go on)
                lost = Update(request=request.id, finish="error", problem=f"{type(error).__name__}: {error}")
                generator.cancel(request.id)
                link.send(
                    {"kind": "step", "updates": [update_to_wire(lost)], "stats": stats_to_wire(generator.stats())}
                )
        case "cancel":
            generator.cancel(message["request"])
        case kind:
            raise AssertionError(f"the front sends no {kind}")
