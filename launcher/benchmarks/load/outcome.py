"""What became of a call, in times of one clock."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Outcome:
    """Times are ``time.perf_counter()`` less that of the start of the load."""

    number: int
    """Of the call, from 0, in the order in which calls were due."""
    due_s: float
    """When it should have been sent: latencies count from here, or a server that stalls would hide how long."""
    sent_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    """When each piece with text came."""
    end_s: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    """Of the answer, as the server counts them; where it does not, one a piece."""
    error: str = ""
    """Empty, or one word: ``connect``, ``cut``, ``timeout``, ``frame``, ``unfinished``, a status (``429``)."""
    why: str = ""
    text: str = ""
    """The answer, where it is to be kept."""
    finish: str = ""

    @property
    def is_good(self) -> bool:
        """Whether a whole answer came."""
        return not self.error

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.chunks_s[0] - self.due_s

    @property
    def whole_s(self) -> float:
        """Seconds to the end."""
        return self.end_s - self.due_s

    @property
    def per_token_s(self) -> float | None:
        """Mean seconds a token after the first; ``None`` where there is only one."""
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [after - before for before, after in zip(self.chunks_s, self.chunks_s[1:], strict=False)]
