"""What clients may send. A field that is not here is refused by its name; ``null`` stands for one left out."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema

from launcher.serving.api.problems import of_validation
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

B = TypeVar("B", bound="Body")


def _within(limits: Range, *, least: int | None = None) -> Any:
    """Return the bounds of a field; ``least`` is another lower one, for what is rewritten on the way to an engine."""
    if limits.exclusive:
        return Field(gt=limits.least, le=limits.most)
    return Field(ge=least if least is not None else 0.0 if limits.or_zero else limits.least, le=limits.most)


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
MaxTokens = Annotated[int, _within(RANGES["max_tokens"])]
TemplateName = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Body(BaseModel):
    """Strict: no number from a text, no infinity, nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if value is not None}
        return values


def parse(body_type: type[B], data: bytes) -> B:
    """Return the body that ``data`` holds.

    Raises:
        ApiError: it holds none; the message names the field.
    """
    try:
        return body_type.model_validate_json(data)
    except ValidationError as error:
        raise of_validation(error) from None


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
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] = []
    presence_penalty: Annotated[float, _within(RANGES["presence_penalty"])] = 0.0
    frequency_penalty: Annotated[float, _within(RANGES["frequency_penalty"])] = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, _within(BIAS)]], Field(max_length=MOST_BIASES)] = {}
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
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_STOP_IDS)] = []
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

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    """A text, tokens, or a list of either."""
    max_tokens: MaxTokens = 16
    logprobs: Annotated[int, _within(RANGES["logprobs"])] | None = None
    """Also return the likeliest tokens, so many of them."""
    echo: bool = False
    """Whether the prompt comes before its completion."""
    best_of: int | None = None
    """Nothing but ``n`` itself."""


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    """``developer`` is OpenAI's newer word for ``system``."""
    content: str | list[TextPart] | SkipJsonSchema[None]  # the schema cannot say that only an assistant's may be null
    """``null`` for an assistant that said nothing."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if value is not None or name == "content"}
        return values


class ResponseFormat(Body):
    """Only text."""

    type: Literal["text"]


class ChatBody(Generating):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
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
    prompt: str | None = None
    messages: list[Message] | None = None
    chat_template: TemplateName | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """``/detokenize``."""

    model: str | None = None
    tokens: list[TokenId]
