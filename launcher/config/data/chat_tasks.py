"""Chats about small tasks, made here: each question has one right answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

NUM_CHATS = 2000
"""Rows of the data set."""
_MOST_TURNS = 3
_WORDS = (
    *("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket"),
    *("kitchen", "ladder", "market", "needle", "orange", "pencil", "quarry", "river", "saddle", "table"),
    *("umbrella", "valley", "window", "yellow", "anchor", "basket", "copper", "dinner", "eagle", "feather"),
    *("glove", "harbor", "iron", "jungle", "kettle", "lemon", "mirror", "north", "ocean", "paper"),
)


class _Draws:
    """Numbers that a key decides, the same under every version of Python."""

    def __init__(self, key: str) -> None:
        self._key, self._drawn = key, 0

    def below(self, limit: int) -> int:
        """Return the next number, from 0 to ``limit - 1``."""
        self._drawn += 1
        digest = hashlib.sha256(f"{self._key} {self._drawn}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % limit

    def words(self, num_words: int) -> list[str]:
        """Return different words."""
        left = list(_WORDS)
        return [left.pop(self.below(len(left))) for _ in range(num_words)]

    def numbers(self, num_numbers: int) -> list[int]:
        """Return different numbers of two digits."""
        left = list(range(10, 100))
        return [left.pop(self.below(len(left))) for _ in range(num_numbers)]


def _sum(draws: _Draws) -> tuple[str, str]:
    first, second = 10 + draws.below(80), 2 + draws.below(28)
    return f"What is {first} + {second}?", f"{first} + {second} = {first + second}"


def _largest(draws: _Draws) -> tuple[str, str]:
    numbers = draws.numbers(3)
    return f"Which number is the largest: {_listed(numbers)}?", f"The largest number is {max(numbers)}."


def _smallest(draws: _Draws) -> tuple[str, str]:
    numbers = draws.numbers(3)
    return f"Which number is the smallest: {_listed(numbers)}?", f"The smallest number is {min(numbers)}."


def _first(draws: _Draws) -> tuple[str, str]:
    words = draws.words(3 + draws.below(3))
    return f"What is the first word of: {' '.join(words)}?", f"The first word is {words[0]}."


def _last(draws: _Draws) -> tuple[str, str]:
    words = draws.words(3 + draws.below(3))
    return f"What is the last word of: {' '.join(words)}?", f"The last word is {words[-1]}."


def _count(draws: _Draws) -> tuple[str, str]:
    words = draws.words(3 + draws.below(4))
    return f"How many words are these: {' '.join(words)}?", f"These are {len(words)} words."


def _capitals(draws: _Draws) -> tuple[str, str]:
    words = draws.words(2)
    return f"Write in capital letters: {' '.join(words)}", " ".join(words).upper()


def _alphabet(draws: _Draws) -> tuple[str, str]:
    words = draws.words(2)
    question = f"Which word comes first in the alphabet: {words[0]} or {words[1]}?"
    return question, f"The word {min(words)} comes first."


_TASKS: tuple[Callable[[_Draws], tuple[str, str]], ...] = (
    *(_sum, _largest, _smallest, _first, _last, _count, _capitals, _alphabet),
)


def chat_tasks(num_chats: int = NUM_CHATS) -> Iterator[dict[str, Any]]:
    """Yield conversations of one to three questions with their answers, as rows of ``messages``.

    No question occurs twice, so held-out chats ask what no other one does.
    """
    asked: set[str] = set()
    for number in range(num_chats):
        draws = _Draws(f"chat {number}")
        messages: list[dict[str, str]] = []
        for _ in range(1 + draws.below(_MOST_TURNS)):
            question, answer = _TASKS[draws.below(len(_TASKS))](draws)
            while question in asked:
                question, answer = _TASKS[draws.below(len(_TASKS))](draws)
            asked.add(question)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        yield {"messages": messages}


def _listed(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}"
