"""A line of the prompt file as an engine's request, and its tokens as a line of output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from launcher.config.data.rows import Record
from launcher.config.prompt_file import SAMPLING_FIELDS, BadLine, check_fields
from launcher.config.sampling import SamplingParams, validate_sampling, validate_stop_strings
from launcher.errors import ConfigError
from launcher.inference.detokenizer import TextStream
from launcher.inference.engine.base import EngineOutput, FinishReason, GeneratedToken
from launcher.inference.tokenizer import ChatTemplateNotFound, InvalidMessages, TextTokenizer, normalize_messages
from launcher.utils.schema import build
from launcher.utils.text import did_you_mean

_SEED_BYTES = 6
NO_MODELS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One line, ready for an engine."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...]
    """Texts that end the answer and are no part of it."""
    adapter: str
    """Name of the adapter; empty is the base model."""


def parse_request(
    record: Record,
    default_fields: Mapping[str, Any],
    tokenizer: TextTokenizer,
    *,
    seed: int,
    models: Mapping[str, str] = NO_MODELS,
) -> GenerationRequest:
    """Return the request of a record.

    Args:
        record: the line.
        default_fields: values of ``stop`` and of sampling fields that hold where the line says nothing.
        tokenizer: the tokenizer.
        seed: of the run: a line that draws tokens and names no seed gets one from it and its own number.
        models: adapter of each name that a line's ``model`` may have; empty is the base model.

    Raises:
        BadLine: it cannot be done.
    """
    check_fields(record)
    given = {name: value for name, value in record.fields.items() if value is not None}
    asked = {**default_fields, **given}
    sampling = _sampling({name: asked[name] for name in SAMPLING_FIELDS if name in asked})
    if sampling.seed is None and sampling.temperature > 0:
        asked["seed"] = line_seed(seed, record.line)
        sampling = _sampling({name: asked[name] for name in SAMPLING_FIELDS if name in asked})
    return GenerationRequest(
        prompt=_prompt(given, tokenizer),
        sampling=sampling,
        stop=_stop(asked.get("stop", ())),
        adapter=_adapter(asked.get("model"), models),
    )


def line_seed(seed: int, line: int) -> int:
    """Return a line's seed: stable, and different from those of other lines and runs."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{line}".encode()).digest()[:_SEED_BYTES])


def _sampling(values: Mapping[str, Any]) -> SamplingParams:
    mistakes: list[ConfigError] = []
    built = build(SamplingParams, values, path="", report=mistakes.append)
    if built is None:
        raise BadLine("; ".join(map(str, mistakes)))
    errors = [f"{name}={getattr(built, name)}: {why}" for name, why, _ in validate_sampling(built)]
    if errors:
        raise BadLine("; ".join(errors))
    return built


def _prompt(given: Mapping[str, Any], tokenizer: TextTokenizer) -> tuple[int, ...]:
    ids = _chat(given, tokenizer) if "messages" in given else _text_or_ids(given["prompt"], tokenizer)
    if not ids:
        raise BadLine("prompt: is empty")
    return tuple(ids)


def _text_or_ids(prompt: Any, tokenizer: TextTokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(_check_unicode(prompt, "prompt"))
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return cast("list[int]", prompt)
    raise BadLine("prompt: takes text, or a list of token numbers")


def _chat(given: Mapping[str, Any], tokenizer: TextTokenizer) -> list[int]:
    template = given.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise BadLine("chat_template: takes the name of one of the tokenizer's templates")
    try:
        messages = normalize_messages(given["messages"])
        for message in messages:
            _check_unicode(message["content"], "messages")
        return tokenizer.encode_chat(messages, template=template)
    except InvalidMessages as error:
        raise BadLine(f"messages: {error}{f' ({error.field})' if error.field != 'messages' else ''}") from error
    except ChatTemplateNotFound as error:
        field, instead = ("chat_template", "") if template else ("messages", "; give prompt instead")
        raise BadLine(f"{field}: {error}{instead}") from error
    except ValueError as error:
        raise BadLine(f"messages: {error}") from error


def _adapter(name: Any, models: Mapping[str, str]) -> str:
    if name is None:
        return ""
    if not isinstance(name, str) or name not in models:
        raise BadLine(f"model: there is no model {str(name)[:100]!r}; {did_you_mean(str(name), models)}")
    return models[name]


def _stop(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) and string for string in strings):
        raise BadLine("stop: takes a text or a list of texts, none of them empty")
    if why := validate_stop_strings(strings):
        raise BadLine(f"stop: {why}")
    return tuple(strings)


def _check_unicode(text: str, field: str) -> str:
    r"""Return a text that UTF-8 can write: JSON's ``\ud800`` alone is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"{field}: contains half of a surrogate pair, which is not a character") from error
    return text


class GenerationResult:
    """Collects the tokens of one request.

    Args:
        record: the line.
        request: of the line.
        tokenizer: the tokenizer.
    """

    def __init__(self, record: Record, request: GenerationRequest, tokenizer: TextTokenizer) -> None:
        self.record, self._request = record, request
        self._text = TextStream(tokenizer.decode, request.stop)
        self._pieces: list[str] = []
        self._tokens: list[GeneratedToken] = []

    @property
    def num_tokens(self) -> int:
        """Tokens that were generated."""
        return len(self._tokens)

    def add_output(self, output: EngineOutput) -> FinishReason | None:
        """Add the output of a step; return the finish reason once the answer has ended."""
        for token in output.tokens:
            self._tokens.append(token)
            self._pieces.append(self._text.feed(token.id))
            if self._text.stopped is not None:
                return "stop"
        if output.finish_reason is not None:
            self._pieces.append(self._text.rest())
        return "stop" if self._text.stopped is not None else output.finish_reason

    def line(self, finish_reason: FinishReason) -> bytes:
        """Return the line of the answer."""
        found: dict[str, Any] = {
            **_head(self.record),
            "text": "".join(self._pieces),
            "finish_reason": finish_reason,
            "prompt_tokens": len(self._request.prompt),
            "completion_tokens": self.num_tokens,
        }
        if self._text.stopped is not None:
            found["stop_reason"] = self._text.stopped
        if self._request.sampling.seed is not None:
            found["seed"] = self._request.sampling.seed
        if self._request.sampling.logprobs is not None:
            found["logprobs"] = [
                {"id": token.id, "logprob": token.logprob, "top": [list(pair) for pair in token.top]}
                for token in self._tokens
            ]
        return _dump_line(found)


def error_line(record: Record, why: str) -> bytes:
    """Return the output line for a line that cannot be answered."""
    return _dump_line({**_head(record), "error": why})


def _head(record: Record) -> dict[str, Any]:
    return {"line": record.line} | ({"id": record.fields["id"]} if "id" in record.fields else {})


def _dump_line(value: dict[str, Any]) -> bytes:
    """Return one line of JSON.

    What is not Unicode (half a surrogate pair in an ``id``) is escaped, as in the input.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()
