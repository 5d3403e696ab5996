"""What a line asks for: its prompt as tokens, and how to continue it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from launcher.errors import ConfigError
from launcher.generation.source import Record, unknown_field
from launcher.schema import build
from launcher.serving.chat import BadMessages, NoTemplate, plain_messages
from launcher.serving.ranges import out_of_range, stops_problem
from launcher.serving.values import Sampling
from launcher.serving.words import Words

SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling))
FIELDS = ("prompt", "messages", "chat_template", "id", "stop", *SAMPLING_FIELDS)
"""All that a line may say."""

_SEED_BYTES = 6


class BadLine(Exception):
    """A line asks for what there is not; the message says what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """One line, ready for an engine."""

    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...]
    """Texts that end the answer and are no part of it."""


def wish_of(record: Record, usual: Mapping[str, Any], words: Words, *, seed: int) -> Wish:
    """Return what a record asks for.

    Args:
        record: the line.
        usual: values of ``stop`` and of sampling fields that hold where the line says nothing.
        words: the tokenizer.
        seed: of the run: a line that draws tokens and names no seed gets one from it and its own number.

    Raises:
        BadLine: it cannot be done.
    """
    check_fields(record)
    given = {name: value for name, value in record.fields.items() if value is not None}
    asked = {**usual, **given}
    sampling = _sampling({name: asked[name] for name in SAMPLING_FIELDS if name in asked})
    if sampling.seed is None and sampling.temperature > 0:
        asked["seed"] = seed_of(seed, record.line)
        sampling = _sampling({name: asked[name] for name in SAMPLING_FIELDS if name in asked})
    return Wish(prompt=_prompt(given, words), sampling=sampling, stop=_stop(asked.get("stop", ())))


def check_fields(record: Record) -> None:
    """Refuse a line that cannot be read, has fields that do not exist, or no prompt: what can be said without a model.

    Raises:
        BadLine: says what is wrong.
    """
    if record.problem:
        raise BadLine(record.problem)
    for name in record.fields:
        if name not in FIELDS:
            raise BadLine(unknown_field(name, FIELDS, beside=record.fields))
    given = {name for name, value in record.fields.items() if value is not None}
    if ("prompt" in given) == ("messages" in given):
        raise BadLine("needs prompt or messages, and not both")
    if "chat_template" in given and "messages" not in given:
        raise BadLine("chat_template: is for messages, and this line has prompt")


def seed_of(seed: int, line: int) -> int:
    """Return the seed of a line: always the same, and unlike those of other lines and other runs."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{line}".encode()).digest()[:_SEED_BYTES])


def _sampling(values: Mapping[str, Any]) -> Sampling:
    mistakes: list[ConfigError] = []
    built = build(Sampling, values, path="", report=mistakes.append)
    if built is None:
        raise BadLine("; ".join(map(str, mistakes)))
    problems = [f"{name}={getattr(built, name)}: {why}" for name, why, _ in out_of_range(built)]
    if problems:
        raise BadLine("; ".join(problems))
    return built


def _prompt(given: Mapping[str, Any], words: Words) -> tuple[int, ...]:
    ids = _chat(given, words) if "messages" in given else _text_or_ids(given["prompt"], words)
    if not ids:
        raise BadLine("prompt: is empty")
    return tuple(ids)


def _text_or_ids(prompt: Any, words: Words) -> list[int]:
    if isinstance(prompt, str):
        return words.encode(_sound(prompt, "prompt"))
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return cast("list[int]", prompt)
    raise BadLine("prompt: takes text, or a list of token numbers")


def _chat(given: Mapping[str, Any], words: Words) -> list[int]:
    template = given.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise BadLine("chat_template: takes the name of one of the tokenizer's templates")
    try:
        messages = plain_messages(given["messages"])
        for message in messages:
            _sound(message["content"], "messages")
        return words.encode(words.render(messages, template), special=False)
    except BadMessages as error:
        raise BadLine(f"messages: {error}{f' ({error.field})' if error.field != 'messages' else ''}") from error
    except NoTemplate as error:
        field, instead = ("chat_template", "") if template else ("messages", "; give prompt instead")
        raise BadLine(f"{field}: {error}{instead}") from error
    except ValueError as error:
        raise BadLine(f"messages: {error}") from error


def _stop(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) and string for string in strings):
        raise BadLine("stop: takes a text or a list of texts, none of them empty")
    if why := stops_problem(strings):
        raise BadLine(f"stop: {why}")
    return tuple(strings)


def _sound(text: str, field: str) -> str:
    r"""Return a text that UTF-8 can write: JSON's ``\ud800`` alone is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"{field}: holds half of a surrogate pair, which is no character") from error
    return text
