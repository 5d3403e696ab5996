"""Bodies of requests: unknown fields are rejected, known ones that are ``null`` are default."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

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

from launcher.config.sampling import (
    LOGIT_BIAS_RANGE,
    MAX_LOGIT_BIASES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    NUM_CHOICES_RANGE,
    PRIORITY_RANGE,
    RANGES,
    ParameterRange,
)


def _within(limits: ParameterRange, *, minimum: int | None = None) -> Any:
    """Return the bounds of a field; ``minimum`` replaces the lower one.

    For values that are rewritten on the way to an engine.
    """
    if limits.exclusive:
        return Field(gt=limits.minimum, le=limits.maximum)
    return Field(ge=minimum if minimum is not None else 0.0 if limits.or_zero else limits.minimum, le=limits.maximum)


MaxTokens = Annotated[int, _within(RANGES["max_tokens"])]
TemplateName = Annotated[str, Field(min_length=1, max_length=256)]
_TOKEN_LIMIT = 2**31
_MAX_MESSAGES = 2048
_MAX_PARTS = 1024
_MAX_FIELDS = 64
"""Fields of one object, unknown ones and nulls included."""
MAX_CHARACTERS = 1 << 18
"""Characters of a text of ``/tokenize``, whose answer has a number for each token."""
MAX_DETOKENIZED = 1 << 16
"""Tokens of ``/detokenize``."""


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """Lengths that a server takes."""

    max_model_len: int
    """Tokens of a prompt, with its answer."""
    max_prompts: int
    """Prompts of one request."""


def _error(message: str, *, code: str = "invalid_value") -> PydanticCustomError:
    """Return an error whose text is for the client as it is."""
    return PydanticCustomError(code, "{message}", {"message": message})


def shorten_value(value: Any) -> str:
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
        raise _error(said, code="context_length_exceeded" if hint else "invalid_value")
    if set(map(type, value)) <= {int} and min(value, default=0) >= 0 and max(value, default=0) < _TOKEN_LIMIT:
        return  # a third of the time that the loop below takes, which finds the element to name
    for at, each in enumerate(value):
        if type(each) is not int or not 0 <= each < _TOKEN_LIMIT:
            raise _error(f"element {at} is {shorten_value(each)}, which is not the number of a token{hint}")


_PROMPTS = "text, token numbers, or a list of either"


def _check_prompt(value: Any, info: ValidationInfo) -> str | list[int] | list[str] | list[list[int]]:
    """Return a prompt; raise for the first thing that is wrong with it."""
    limits: BodyLimits | None = info.context
    most_ids = limits.max_model_len if limits else _TOKEN_LIMIT
    most_prompts = limits.max_prompts if limits else _TOKEN_LIMIT
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _error(f"is {shorten_value(value)}; give {_PROMPTS}")
    first, hint = value[0], f"; give {_PROMPTS}"
    if not isinstance(first, str | list):
        _check_ids(value, limit=most_ids, hint=hint)
        return value
    if len(value) > most_prompts:
        raise _error(f"asks for {len(value):,} sequences at once; this server allows {most_prompts:,}")
    if isinstance(first, str):
        for at, each in enumerate(value):
            if not isinstance(each, str):
                raise _error(f"element {at} is {shorten_value(each)}, and the first one is text{hint}")
        return value
    for at, each in enumerate(value):
        if not isinstance(each, list) or not each:
            raise _error(f"element {at} is {shorten_value(each)}, and the first one is a list of token numbers{hint}")
        _check_ids(each, limit=most_ids, hint=f" (in element {at}){hint}")
    return value


def _check_tokens(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise _error(f"is {shorten_value(value)}; give a list of token numbers")
    _check_ids(value, limit=MAX_DETOKENIZED)
    return value


def _check_stop(value: Any) -> str | list[str]:
    """Return the strings that end a text; raise for the first that cannot."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list):
        raise _error(f"is {shorten_value(value)}; give a text or a list of texts")
    if len(given) > MAX_STOP_STRINGS:
        raise _error(f"has {len(given):,} texts; at most {MAX_STOP_STRINGS} are allowed")
    for each in given:
        if not isinstance(each, str):
            raise _error(f"has {shorten_value(each)} in it; give a text or a list of texts")
        if not 1 <= len(each) <= MAX_STOP_LENGTH:
            raise _error(f"has a text of {len(each):,} characters; give 1 to {MAX_STOP_LENGTH} characters")
    return value  # type: ignore[no-any-return]


def _check_bias(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise _error(f"is {shorten_value(value)}; give an object that maps tokens to numbers")
    if len(value) > MAX_LOGIT_BIASES:
        raise _error(f"has {len(value):,} tokens; at most {MAX_LOGIT_BIASES:,} are allowed")
    for token, added in value.items():
        if type(added) not in (int, float) or LOGIT_BIAS_RANGE.validate(added):
            said = f"token {token[:20]!r} has {shorten_value(added)}; give a number from "
            raise _error(f"{said}{LOGIT_BIAS_RANGE.minimum:g} to {LOGIT_BIAS_RANGE.maximum:g}")
    return {token: float(added) for token, added in value.items()}


class ImagePart(NamedTuple):
    """An image in a message, where it stands between the texts."""

    url: str
    number: int
    """Of the part in its message."""


def _check_content(value: Any, info: ValidationInfo) -> str | list[str | ImagePart]:
    """Return the text of a message, its parts joined; a list of parts if it has images."""
    if value is None and info.data.get("role") == "assistant":
        return ""
    if value is None:
        raise _error("is null, which only an assistant's may be")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _error(f"is {shorten_value(value)}; give a text or a list of text parts")
    if len(value) > _MAX_PARTS:
        raise _error(f"has {len(value):,} parts; at most {_MAX_PARTS:,} are allowed")
    parts = [_check_part(part, at) for at, part in enumerate(value)]
    if not any(isinstance(part, ImagePart) for part in parts):
        return "".join(map(str, parts))
    if info.data.get("role") != "user":
        raise _error("has images, which only a user's message may have")
    return parts


def _check_part(part: Any, at: int) -> str | ImagePart:
    """Return one part of a message."""
    if not isinstance(part, dict):
        raise _error(f'part {at} is {shorten_value(part)}; give {{"type": "text", "text": TEXT}}')
    kind = part.get("type")
    if kind not in ("text", "image_url"):
        raise _error(f"part {at} has the type {shorten_value(kind)}; this server supports text and image_url only")
    if more := next((name for name in part if not _may_have(part, name, kind)), None):
        raise _error(f"part {at} has the field {more[:40]!r}, which this server does not have")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise _error(f"part {at} has {shorten_value(part.get('text'))} as its text; give a text")
        return str(part["text"])
    image = part.get("image_url")
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise _error(
            f'part {at} has {shorten_value(image)} as its image_url; give {{"url": "data:image/png;base64,…"}}'
        )
    if more := next((name for name in image if name not in ("url", "detail")), None):
        raise _error(f"part {at} has the field image_url.{more[:40]!r}, which this server does not have")
    if image.get("detail") not in (None, "auto"):
        said = f"part {at} has the detail {shorten_value(image['detail'])}; the model decides about the size of images"
        raise _error(f"{said}, so leave image_url.detail out")
    return ImagePart(image["url"], at)


def _may_have(part: dict[str, Any], name: str, kind: str) -> bool:
    return name in ("type", kind) or (name in _OPENAI_PART_FIELDS and part[name] is None)


def _check_stop_ids(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise _error(f"is {shorten_value(value)}; give a list of token numbers")
    _check_ids(value, limit=MAX_STOP_TOKEN_IDS)
    return value


def _checked(check: Callable[..., Any], *shapes: dict[str, Any]) -> tuple[PlainValidator, WithJsonSchema]:
    """Return the validator and the OpenAPI schema of a field with its own check."""
    return PlainValidator(check), WithJsonSchema(shapes[0] if len(shapes) == 1 else {"anyOf": list(shapes)})


_TEXT_SCHEMA = {"type": "string"}
_IDS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": _TOKEN_LIMIT},
    "minItems": 1,
}
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_IMAGE_SCHEMA = {
    "type": "object",
    "properties": {"url": {"type": "string", "pattern": "^data:image/[a-z]+;base64,"}, "detail": {"const": "auto"}},
    "required": ["url"],
    "additionalProperties": False,
}
_PART_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"const": kind}, kind: schema},
            "required": ["type", kind],
            "additionalProperties": False,
        }
        for kind, schema in (("text", _TEXT_SCHEMA), ("image_url", _IMAGE_SCHEMA))
    ]
}
_LIST_SCHEMA = {"type": "array", "minItems": 1}
Prompt = Annotated[
    str | list[int] | list[str] | list[list[int]],
    *_checked(
        _check_prompt,
        _TEXT_SCHEMA,
        _IDS_SCHEMA,
        {**_LIST_SCHEMA, "items": _TEXT_SCHEMA},
        {**_LIST_SCHEMA, "items": _IDS_SCHEMA},
    ),
]
Tokens = Annotated[list[int], *_checked(_check_tokens, {**_IDS_SCHEMA, "minItems": 0, "maxItems": MAX_DETOKENIZED})]
StopTokenIds = Annotated[
    list[int], *_checked(_check_stop_ids, {**_IDS_SCHEMA, "minItems": 0, "maxItems": MAX_STOP_TOKEN_IDS})
]
Stop = Annotated[
    str | list[str],
    *_checked(_check_stop, _STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOP_STRINGS}),
]
_BIAS_SCHEMA = {"type": "number", "minimum": LOGIT_BIAS_RANGE.minimum, "maximum": LOGIT_BIAS_RANGE.maximum}
LogitBias = Annotated[
    dict[str, float],
    *_checked(_check_bias, {"type": "object", "additionalProperties": _BIAS_SCHEMA, "maxProperties": MAX_LOGIT_BIASES}),
]
_OPENAI_PART_FIELDS = frozenset({"image_url", "text", "input_audio", "file", "refusal"})
Content = Annotated[
    str | list[str | ImagePart],
    *_checked(_check_content, _TEXT_SCHEMA, {"type": "array", "items": _PART_SCHEMA, "maxItems": _MAX_PARTS}),
]


class RequestBody(BaseModel):
    """Strict: no number from a text, no infinity, nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    openai_fields: ClassVar[frozenset[str]] = frozenset()
    """Unsupported fields of OpenAI's API, which clients that list all fields send as null."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        """Drop known null fields; reject an object of too many fields before each is an error."""
        if not isinstance(values, dict):
            raise _error(f"is {shorten_value(values)}; give an object")
        if len(values) > _MAX_FIELDS:
            raise _error(f"has {len(values):,} fields; at most {_MAX_FIELDS} are allowed")
        optional = _optional(cls)
        return {name: value for name, value in values.items() if value is not None or name not in optional}


@functools.cache
def _optional(body_type: type[RequestBody]) -> frozenset[str]:
    """Return the known fields that need not be there."""
    own = (name for name, field in body_type.model_fields.items() if not field.is_required())
    return body_type.openai_fields | frozenset(own)


class StreamOptions(RequestBody):
    """Of a stream."""

    openai_fields: ClassVar = frozenset({"include_obfuscation"})

    include_usage: bool = False
    """Send a last event with the number of tokens."""


class GenerationBody(RequestBody):
    """Common fields of completions and chats."""

    openai_fields: ClassVar = frozenset(
        (
            *("suffix", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "modalities"),
            *("audio", "prediction", "store", "metadata", "service_tier", "reasoning_effort", "verbosity"),
            *("web_search_options", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        )
    )

    model: str
    """As ``/v1/models`` lists it."""
    temperature: Annotated[float, _within(RANGES["temperature"])] | None = None
    """0 is greedy; 1 where it is left out, as at OpenAI (0 with ``num_beams``)."""
    top_p: Annotated[float, _within(RANGES["top_p"])] = 1.0
    n: Annotated[int, _within(NUM_CHOICES_RANGE)] = 1
    """Choices for each prompt."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop = []
    presence_penalty: Annotated[float, _within(RANGES["presence_penalty"])] = 0.0
    frequency_penalty: Annotated[float, _within(RANGES["frequency_penalty"])] = 0.0
    logit_bias: LogitBias = {}
    seed: Annotated[int, _within(RANGES["seed"], minimum=-(2**63))] | None = None
    """The same seed gives the same answer; choice number k has a seed made of this one and k."""
    user: str | None = None
    """Taken and not used: it names the end user to OpenAI."""
    top_k: Annotated[int, _within(RANGES["top_k"], minimum=-1)] = 0
    """0 and -1 keep all."""
    min_p: Annotated[float, _within(RANGES["min_p"])] = 0.0
    repetition_penalty: Annotated[float, _within(RANGES["repetition_penalty"])] = 1.0
    no_repeat_ngram_size: Annotated[int, _within(RANGES["no_repeat_ngram_size"])] = 0
    num_beams: Annotated[int, _within(RANGES["num_beams"])] = 1
    length_penalty: Annotated[float, _within(RANGES["length_penalty"])] = 1.0
    min_tokens: Annotated[int, _within(RANGES["min_tokens"])] = 0
    stop_token_ids: StopTokenIds = []
    ignore_eos: bool = False
    priority: Annotated[int, _within(PRIORITY_RANGE)] = 0
    """Higher is sooner."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end the text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(GenerationBody):
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


class ChatMessage(RequestBody):
    """One message of a chat."""

    openai_fields: ClassVar = frozenset(
        {"name", "refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id"}
    )

    role: Literal["system", "developer", "user", "assistant"]
    """``developer`` is OpenAI's newer word for ``system``."""
    content: Content
    """Text, a list of parts (text to join, images), or ``null`` for an assistant without text."""


ChatMessages = Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)]


class ResponseFormat(RequestBody):
    """Only text."""

    openai_fields: ClassVar = frozenset({"json_schema"})

    type: Literal["text"]


class ChatBody(GenerationBody):
    """``/v1/chat/completions``."""

    messages: ChatMessages
    chat_template: TemplateName | None = None
    """Name of one of the tokenizer's chat templates; default: ``job.chat_template``."""
    max_tokens: MaxTokens | None = None
    """Where it is left out, up to the end of the context."""
    max_completion_tokens: MaxTokens | None = None
    """OpenAI's newer word for ``max_tokens``."""
    logprobs: bool = False
    top_logprobs: Annotated[int, _within(RANGES["logprobs"])] = 0
    response_format: ResponseFormat | None = None


class TokenizeBody(RequestBody):
    """``/tokenize``: a text or a chat."""

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    messages: ChatMessages | None = None
    chat_template: TemplateName | None = None
    add_special_tokens: bool = True


class DetokenizeBody(RequestBody):
    """``/detokenize``."""

    model: str | None = None
    tokens: Tokens


GENERATION_ENDPOINTS: dict[str, type[GenerationBody]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}
_LOGPROBS = {
    "/v1/completions": "a number of tokens for each position",
    "/v1/chat/completions": "true or false, with that number in top_logprobs",
}
_NESTED_BODIES: dict[str, type[RequestBody]] = {
    "messages": ChatMessage,
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
}
"""Types of the objects inside a body, by field."""


def endpoint_that_takes(name: str, body_type: type[BaseModel]) -> str | None:
    """Return the other endpoint that generates text, if it takes a field that this one lacks."""
    if body_type not in GENERATION_ENDPOINTS.values() or name in body_type.model_fields:
        return None
    found = (path for path, other in GENERATION_ENDPOINTS.items() if name in other.model_fields)
    return next(found, None)


def unknown_field(place: Sequence[str | int], body_type: type[RequestBody]) -> str:
    """Return why a body cannot have the field at ``place``, naming the endpoint that takes it."""
    name = str(place[-1])
    if len(place) > 1:
        body_type = _NESTED_BODIES[str(place[0])]
    elif (other := endpoint_that_takes(name, body_type)) is not None:
        own = next(path for path, each in GENERATION_ENDPOINTS.items() if each is body_type)
        return f"{own} does not take this field, {other} does"
    if name in body_type.openai_fields:
        return "this server does not support this field of OpenAI's API"
    return "this server has no such field"


def logprobs_of_endpoints(name: str, body_type: type[BaseModel]) -> str:
    """Return each endpoint's type of ``logprobs``, for a type error; empty for other fields."""
    if name != "logprobs" or body_type not in GENERATION_ENDPOINTS.values():
        return ""
    return "".join(f"; {path} takes {what}" for path, what in _LOGPROBS.items())
