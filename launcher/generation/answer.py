"""One answer while it is generated, and the line that it becomes."""

from __future__ import annotations

import json
from typing import Any

from launcher.generation.source import Record
from launcher.generation.wish import Wish
from launcher.serving.text import TextOf
from launcher.serving.values import Finish, Token, Update
from launcher.serving.words import Words


class Answer:
    """Collects the tokens of one request.

    Args:
        record: the line that asks.
        wish: what it asks for.
        words: the tokenizer.
    """

    def __init__(self, record: Record, wish: Wish, words: Words) -> None:
        self.record, self._wish = record, wish
        self._text = TextOf(words.decode, wish.stop)
        self._pieces: list[str] = []
        self._tokens: list[Token] = []

    @property
    def num_tokens(self) -> int:
        """Tokens that were generated."""
        return len(self._tokens)

    def take(self, update: Update) -> Finish | None:
        """Take in what a step brought; return why the answer is over, once it is."""
        for token in update.tokens:
            self._tokens.append(token)
            self._pieces.append(self._text.feed(token.id))
            if self._text.stopped is not None:
                return "stop"
        if update.finish is not None:
            self._pieces.append(self._text.rest())
        return "stop" if self._text.stopped is not None else update.finish

    def line(self, finish: Finish) -> bytes:
        """Return the answer as it stands in the output."""
        found: dict[str, Any] = {
            **_head(self.record),
            "text": "".join(self._pieces),
            "finish": finish,
            "prompt_tokens": len(self._wish.prompt),
            "tokens": self.num_tokens,
        }
        if self._text.stopped is not None:
            found["stop"] = self._text.stopped
        if self._wish.sampling.seed is not None:
            found["seed"] = self._wish.sampling.seed
        if self._wish.sampling.logprobs is not None:
            found["logprobs"] = [
                {"id": token.id, "logprob": token.logprob, "top": [list(pair) for pair in token.top]}
                for token in self._tokens
            ]
        return _dumped(found)


def error_line(record: Record, why: str) -> bytes:
    """Return what stands in the output for a line that cannot be answered."""
    return _dumped({**_head(record), "error": why})


def _head(record: Record) -> dict[str, Any]:
    return {"line": record.line} | ({"id": record.fields["id"]} if "id" in record.fields else {})


def _dumped(value: dict[str, Any]) -> bytes:
    """Return one line of JSON; what is no Unicode (half a surrogate pair in an ``id``) is escaped, as it came."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()
