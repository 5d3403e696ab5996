"""Text from tokens as they are generated: no partial characters, no parts of stop strings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from launcher.models.tokenizer import REPLACEMENT

_LONGEST = 3
"""Trailing replacement characters that may become one character, of up to four bytes."""
_WINDOW, _CONTEXT = 36, 4 * _LONGEST
"""Most tokens decoded together, and how many stay when the window moves.
If they are one byte each, they must hold every character at the end that is not complete yet, and the end of one that
is cut."""


class Detokenizer:
    """Incremental detokenizer: its pieces together are the text of all tokens.

    A window of the newest tokens is decoded, so that the cost of a token does not grow with the text, and decoders
    that treat the beginning of a text otherwise see some tokens before it.

    Args:
        decode: text of a list of tokens.
        before: tokens that the text continues.

    Attributes:
        opening: the text of ``before``, but for half a character at its end, which the first pieces complete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids: list[int] = list(before)
        self._text = decode(self._ids) if before else ""
        """Text of the window."""
        self.opening = self._text[: len(self._text) - _held(self._text)]
        self._emitted = len(self.opening)
        """Characters of the window's text that are out."""
        self._move_window()

    def feed(self, token: int) -> str:
        """Take one token; return what text is certain now."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text == self._text and not self._is_text(token):
            self._ids.pop()
        self._text = text
        held = _held(text)
        certain = len(text) - held
        piece = text[self._emitted : certain]
        self._emitted = max(self._emitted, certain)
        self._move_window()
        return piece

    def rest(self) -> str:
        """Return the remaining text, after the last token."""
        piece = self._text[self._emitted :]
        self._emitted += len(piece)
        return piece

    def _move_window(self) -> None:
        """Keep the newest tokens once there are many; what is held back of their text stays so."""
        if len(self._ids) >= _WINDOW:
            held = _held(self._text)
            texts = (token for token in reversed(self._ids) if self._is_text(token))
            self._ids = list(itertools.islice(texts, _CONTEXT))[::-1]
            self._text = self._decode(self._ids)
            self._emitted = len(self._text) - held

    def _is_text(self, token: int) -> bool:
        """Return whether a token has visible text.

        After special ones alone a decoder drops a space, as at a beginning.
        """
        return bool(self._decode([token] * 3))  # where a decoder drops a space it drops one, not three


def _held(text: str) -> int:
    """Return how many characters at the end are of bytes that may still become one character."""
    return min(_LONGEST, len(text) - len(text.rstrip(REPLACEMENT)))


class StopStringMatcher:
    """Finds stop strings in a text, and holds back a possible beginning of one.

    The string that is complete first ends the text; of several that end at the same character, the longest.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, strings), default=0)
        self._held = ""
        self.found: str | None = None
        """The string that ended the text."""

    def feed(self, text: str) -> str:
        """Take text; return what may go out. Once ``found`` is set, that was the last of it."""
        assert self.found is None, "the text has ended"
        if not self._strings:
            return text
        whole = self._held + text
        hits = [(at + len(string), at, string) for string in self._strings if (at := whole.find(string)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return whole[:at]
        keep = next(
            (
                length
                for length in range(min(self._longest - 1, len(whole)), 0, -1)
                if any(string.startswith(whole[-length:]) for string in self._strings)
            ),
            0,
        )
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def rest(self) -> str:
        """Return the text held back, after the last text."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Both together, for one sequence: tokens in, text that may be shown out.

    Args:
        decode: text of a list of tokens.
        stops: strings that end the text and are no part of it.
        before: tokens that the text continues; no string is looked for in their text.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), *, before: Sequence[int] = ()
    ) -> None:
        self._tokens, self._stops = Detokenizer(decode, before), StopStringMatcher(stops)

    @property
    def opening(self) -> str:
        """The text of ``before``."""
        return self._tokens.opening

    @property
    def stopped(self) -> str | None:
        """The string that ended the text, if one did."""
        return self._stops.found

    def feed(self, token: int, *, may_stop: bool = True) -> str:
        """Add one token; return the text to send.

        Where the text may not stop, no string is searched in it.
        """
        piece = self._tokens.feed(token)
        return self._stops.feed(piece) if may_stop else piece

    def rest(self) -> str:
        """Return the remaining text, after the last token; a stop string may end it."""
        if self._stops.found is not None:
            return ""
        last = self._stops.feed(self._tokens.rest())
        return last if self._stops.found is not None else last + self._stops.rest()
