"""Requests while the engine works on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.serving.pages import NOTHING_NOTED, Noted
from launcher.serving.values import Request


@dataclass(eq=False, slots=True)
class Row:
    """One sequence that grows."""

    task: Task
    tokens: list[int]
    """Prompt and output."""
    computed: int = 0
    """How many of them have keys and values."""
    pages: list[int] = field(default_factory=list)
    noted: Noted = NOTHING_NOTED

    @property
    def pending(self) -> int:
        """Tokens without keys and values."""
        return len(self.tokens) - self.computed


@dataclass(eq=False, slots=True)
class Task:
    """A request and its sequences: one, or as many as beam search has kept."""

    request: Request
    arrived_s: float
    rows: list[Row] = field(default_factory=list)
    begun: bool = False
    """Whether it has ever left the queue."""
    cached_tokens: int = 0
    told: bool = False
    """Whether an update has gone out."""

    def __post_init__(self) -> None:
        self.rows = [Row(self, list(self.request.prompt))]

    @property
    def priority(self) -> int:
        """Of the request."""
        return self.request.priority

    @property
    def width(self) -> int:
        """Sequences that it may come to have."""
        return self.request.sampling.beams
