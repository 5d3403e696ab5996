"""What clients may send. A field that is not here is refused by its name; ``null`` stands for one left out.

Fields that take one of several types are checked by functions of their own: by the type of the first element, with
lengths before elements, and with the first thing that is wrong. Unions of pydantic would validate every element against
every type and name its own types in errors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from launcher.serving.ranges import (
    BIAS,
    CHOICES,
    LONGEST_STOP,
    MOST_BIASES,
    MOST_STOP_IDS,
    MOST_STOPS,
    PRIORITY,
    RANGES,
    Range,
)


def _within(limits: Range, *, least: int | None = None) -> Any:
    """Return the bounds of a field; ``least`` is another lower one, for what is rewritten on the way to an engine."""
    if limits.exclusive:
        return Field(gt=limits.least, le=limits.most)
    return Field(ge=least if least is not None else 0.0 if limits.or_zero else limits.least, le=limits.most)


MaxTokens = Annotated[int, _within(RANGES["max_tokens"])]
TemplateName = Annotated[str, Field(min_length=1, max_length=256)]
_TOKEN_LIMIT = 2**31
TokenId = Annotated[int, Field(ge=0, lt=_TOKEN_LIMIT)]
_MOST_MESSAGES = 2048
_MOST_PARTS = 1024
_MOST_FIELDS = 64
"""Fields of one object, unknown ones and nulls included."""
MOST_CHARACTERS = 1 << 18
"""Characters of a text of ``/tokenize``, whose answer has a number for each token."""
MOST_DETOKENIZED = 1 << 16
"""Tokens of ``/detokenize``."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Lengths that a server takes."""

    context: int
    """Tokens of a prompt, with its answer."""
    prompts: int
    """Prompts of one request."""


def _wrong(message: str, *, code: str = "invalid_value") -> PydanticCustomError:
    """Return an error whose text is for the client as it is."""
    return PydanticCustomError(code, "{message}", {"message": message})


def shown(value: Any) -> str:
    """Return a value of JSON as an error shows it: short, whatever it is."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if abs(value) >= 10**20:
            return "a number of more than 20 digits"
        case int() | float():
            return str(value)
        case str():
            return repr(value[:40]) + ("…" if len(value) > 40 else "")
        case list():
            return "a list" if value else "an empty list"
        case _:
            return "an object"


def _check_ids(value: Sequence[Any], *, limit: int, hint: str = "") -> None:
    """Raise for the first element that is not the number of a token."""
    if len(value) > limit:
        said = f"has {len(value):,} tokens, and this server takes at most {limit:,}"
        raise _wrong(said, code="context_length_exceeded" if hint else "invalid_value")
    if set(map(type, value)) <= {int} and min(value, default=0) >= 0 and max(value, default=0) < _TOKEN_LIMIT:
        return  # a third of the time that the loop below takes, which finds the element to name
    for at, each in enumerate(value):
        if type(each) is not int or not 0 <= each < _TOKEN_LIMIT:
            raise _wrong(f"element {at} is {shown(each)}, which is not the number of a token{hint}")


_PROMPTS = "text, token numbers, or a list of either"


def _check_prompt(value: Any, info: ValidationInfo) -> str | list[int] | list[str] | list[list[int]]:
    """Return a prompt; raise for the first thing that is wrong with it."""
    bounds: Bounds | None = info.context
    most_ids = bounds.context if bounds else _TOKEN_LIMIT
    most_prompts = bounds.prompts if bounds else _TOKEN_LIMIT
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _wrong(f"is {shown(value)}; give {_PROMPTS}")
    first, hint = value[0], f"; give {_PROMPTS}"
    if not isinstance(first, str | list):
        _check_ids(value, limit=most_ids, hint=hint)
        return value
    if len(value) > most_prompts:
        raise _wrong(f"asks for {len(value):,} sequences at once; this server allows {most_prompts:,}")
    if isinstance(first, str):
        for at, each in enumerate(value):
            if not isinstance(each, str):
                raise _wrong(f"element {at} is {shown(each)}, and the first one is text{hint}")
        return value
    for at, each in enumerate(value):
        if not isinstance(each, list) or not each:
            raise _wrong(f"element {at} is {shown(each)}, and the first one is a list of token numbers{hint}")
        _check_ids(each, limit=most_ids, hint=f" (in element {at}){hint}")
    return value


def _check_tokens(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise _wrong(f"is {shown(value)}; give a list of token numbers")
    _check_ids(value, limit=MOST_DETOKENIZED)
    return value


def _check_stop(value: Any) -> str | list[str]:
    """Return the strings that end a text; raise for the first that cannot."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list):
        raise _wrong(f"is {shown(value)}; give a text or a list of texts")
    if len(given) > MOST_STOPS:
        raise _wrong(f"has {len(given):,} texts; at most {MOST_STOPS} are allowed")
    for each in given:
        if not isinstance(each, str):
            raise _wrong(f"has {shown(each)} in it; give a text or a list of texts")
        if not 1 <= len(each) <= LONGEST_STOP:
            raise _wrong(f"has a text of {len(each):,} characters; give 1 to {LONGEST_STOP} characters")
    return value  # type: ignore[no-any-return]


def _check_bias(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise _wrong(f"is {shown(value)}; give an object that maps tokens to numbers")
    if len(value) > MOST_BIASES:
        raise _wrong(f"has {len(value):,} tokens; at most {MOST_BIASES:,} are allowed")
    for token, added in value.items():
        if type(added) not in (int, float) or BIAS.problem(added):
            said = f"token {token[:20]!r} has {shown(added)}; give a number from {BIAS.least:g} to {BIAS.most:g}"
            raise _wrong(said)
    return {token: float(added) for token, added in value.items()}


def _check_content(value: Any, info: ValidationInfo) -> str:
    """Return the text of a message, whose parts are put together."""
    if value is None and info.data.get("role") == "assistant":
        return ""
    if value is None:
        raise _wrong("is null, which only an assistant's may be")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong(f"is {shown(value)}; give a text or a list of text parts")
    if len(value) > _MOST_PARTS:
        raise _wrong(f"has {len(value):,} parts; at most {_MOST_PARTS:,} are allowed")
    for at, part in enumerate(value):
        if not isinstance(part, dict):
            raise _wrong(f'part {at} is {shown(part)}; give {{"type": "text", "text": TEXT}}')
        if part.get("type") != "text":
            raise _wrong(f"part {at} has the type {shown(part.get('type'))}; this server takes text alone")
        if not isinstance(part.get("text"), str):
            raise _wrong(f"part {at} has {shown(part.get('text'))} as its text; give a text")
        if more := next((name for name in part if name not in ("type", "text") and part[name] is not None), None):
            raise _wrong(f"part {at} has the field {more[:40]!r}, which this server does not have")
    return "".join(part["text"] for part in value)


def _checked(check: Callable[..., Any], *shapes: dict[str, Any]) -> tuple[PlainValidator, WithJsonSchema]:
    """Return what makes a field of a check, with how OpenAPI describes what it takes."""
    return PlainValidator(check), WithJsonSchema(shapes[0] if len(shapes) == 1 else {"anyOf": list(shapes)})


_TEXT = {"type": "string"}
_IDS = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": _TOKEN_LIMIT},
    "minItems": 1,
}
_STOP = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_MANY = {"type": "array", "minItems": 1}
Prompt = Annotated[
    str | list[int] | list[str] | list[list[int]],
    *_checked(_check_prompt, _TEXT, _IDS, {**_MANY, "items": _TEXT}, {**_MANY, "items": _IDS}),
]
Tokens = Annotated[list[int], *_checked(_check_tokens, {**_IDS, "minItems": 0, "maxItems": MOST_DETOKENIZED})]
Stop = Annotated[
    str | list[str], *_checked(_check_stop, _STOP, {"type": "array", "items": _STOP, "maxItems": MOST_STOPS})
]
_BIAS = {"type": "number", "minimum": BIAS.least, "maximum": BIAS.most}
Bias = Annotated[
    dict[str, float],
    *_checked(_check_bias, {"type": "object", "additionalProperties": _BIAS, "maxProperties": MOST_BIASES}),
]
Content = Annotated[str, *_checked(_check_content, _TEXT, {"type": "array", "items": _PART, "maxItems": _MOST_PARTS})]


class Body(BaseModel):
    """Strict: no number from a text, no infinity, nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        """Drop fields that are null, and refuse an object of too many fields before each becomes an error."""
        if not isinstance(values, dict):
            raise _wrong(f"is {shown(values)}; give an object")
        if len(values) > _MOST_FIELDS:
            raise _wrong(f"has {len(values):,} fields; at most {_MOST_FIELDS} are allowed")
        required = _required(cls)
        return {name: value for name, value in values.items() if value is not None or name in required}


@functools.cache
def _required(body_type: type[BaseModel]) -> frozenset[str]:
    return frozenset(name for name, field in body_type.model_fields.items() if field.is_required())


class StreamOptions(Body):
    """Of a stream."""

    include_usage: bool = False
    """Send a last event with the number of tokens."""


class Generating(Body):
    """What completions and chats have in common."""

    model: str
    """As ``/v1/models`` lists it."""
    temperature: Annotated[float, _within(RANGES["temperature"])] | None = None
    """0 is greedy; 1 where it is left out, as at OpenAI (0 with ``num_beams``)."""
    top_p: Annotated[float, _within(RANGES["top_p"])] = 1.0
    n: Annotated[int, _within(CHOICES)] = 1
    """Choices for each prompt."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop = []
    presence_penalty: Annotated[float, _within(RANGES["presence_penalty"])] = 0.0
    frequency_penalty: Annotated[float, _within(RANGES["frequency_penalty"])] = 0.0
    logit_bias: Bias = {}
    seed: Annotated[int, _within(RANGES["seed"], least=-(2**63))] | None = None
    """The same seed gives the same answer; choice number k has a seed made of this one and k."""
    user: str | None = None
    """Taken and not used: it names the end user to OpenAI."""
    top_k: Annotated[int, _within(RANGES["top_k"], least=-1)] = 0
    """0 and -1 keep all."""
    min_p: Annotated[float, _within(RANGES["min_p"])] = 0.0
    repetition_penalty: Annotated[float, _within(RANGES["repetition_penalty"])] = 1.0
    no_repeat_ngram_size: Annotated[int, _within(RANGES["no_repeat_ngram"])] = 0
    num_beams: Annotated[int, _within(RANGES["beams"])] = 1
    length_penalty: Annotated[float, _within(RANGES["length_penalty"])] = 1.0
    min_tokens: Annotated[int, _within(RANGES["min_tokens"])] = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_STOP_IDS, fail_fast=True)] = []
    ignore_eos: bool = False
    priority: Annotated[int, _within(PRIORITY)] = 0
    """Higher is sooner."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Generating):
    """``/v1/completions``."""

    prompt: Prompt
    """A text, tokens, or a list of either."""
    max_tokens: MaxTokens = 16
    logprobs: Annotated[int, _within(RANGES["logprobs"])] | None = None
    """Also return the likeliest tokens, so many of them."""
    echo: bool = False
    """Whether the prompt comes before its completion."""
    best_of: int | None = None
    """Nothing but ``n`` itself."""


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    """``developer`` is OpenAI's newer word for ``system``."""
    content: Content
    """A text, or a list of text parts, which are put together; ``null`` for an assistant that said nothing."""


Messages = Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]


class ResponseFormat(Body):
    """Only text."""

    type: Literal["text"]


class ChatBody(Generating):
    """``/v1/chat/completions``."""

    messages: Messages
    chat_template: TemplateName | None = None
    """Name of one of the tokenizer's chat templates; where it is left out, ``job.chat_template``."""
    max_tokens: MaxTokens | None = None
    """Where it is left out, up to the end of the context."""
    max_completion_tokens: MaxTokens | None = None
    """OpenAI's newer word for ``max_tokens``."""
    logprobs: bool = False
    top_logprobs: Annotated[int, _within(RANGES["logprobs"])] = 0
    response_format: ResponseFormat | None = None


class TokenizeBody(Body):
    """``/tokenize``: a text or a chat."""

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MOST_CHARACTERS)] | None = None
    messages: Messages | None = None
    chat_template: TemplateName | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """``/detokenize``."""

    model: str | None = None
    tokens: Tokens
