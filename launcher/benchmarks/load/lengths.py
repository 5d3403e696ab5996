"""How long prompts and answers are: a number, a range, or a log-normal distribution, written as one word."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

GRAMMAR = "64, 16-256 (even over that range), or lognormal:96:0.8:1024 (median, sigma, most)"
_NUMBER, _RANGE = re.compile(r"\d+"), re.compile(r"(\d+)-(\d+)")
_LOGNORMAL = re.compile(r"lognormal:(\d+):(\d*\.?\d+):(\d+)")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A distribution of whole numbers from ``least`` to ``most``."""

    least: int
    most: int
    median: float | None = None
    """Of the log-normal distribution; ``None`` is an even one."""
    sigma: float = 0.0

    def draw(self, random_: random.Random) -> int:
        """Return one length."""
        if self.median is None:
            return random_.randint(self.least, self.most)
        drawn = random_.lognormvariate(math.log(self.median), self.sigma)
        return min(self.most, max(self.least, round(drawn)))


def parse_lengths(text: str) -> Lengths:
    """Return the distribution that ``text`` writes.

    Raises:
        ValueError: it is not of the grammar, or no length is left; the message says so.
    """
    if _NUMBER.fullmatch(text):
        found = Lengths(least=int(text), most=int(text))
    elif match := _RANGE.fullmatch(text):
        found = Lengths(least=int(match[1]), most=int(match[2]))
    elif match := _LOGNORMAL.fullmatch(text):
        found = Lengths(least=1, most=int(match[3]), median=float(match[1]), sigma=float(match[2]))
    else:
        raise ValueError(f"is no distribution of lengths ({GRAMMAR})")
    if not 1 <= found.least <= found.most or found.median == 0:
        raise ValueError("leaves no length: they begin at 1 and rise")
    return found
