"""What the rows of a data set are: text, prompt and response, conversations, or preferences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.config.data.chat_template import ChatTemplate, TemplateFailed, TrainOn
from launcher.config.data.examples import Example, PreferencePair, RenderedExample, TextSegment, joined
from launcher.config.data.rows import json_type
from launcher.utils.text import did_you_mean

Shape = Literal["text", "prompt_response", "messages", "alpaca", "preference"]

SHAPES: dict[Shape, str] = {
    "text": "text",
    "prompt_response": "prompt and response",
    "messages": "conversations",
    "alpaca": "instruction, input and output",
    "preference": "chosen and rejected answers",
}

_PROMPTS = ("prompt", "question", "query")
_RESPONSES = ("response", "completion", "answer", "output")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_MESSAGE_FIELDS = frozenset(
    ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking", "weight")
)


class BadRow(Exception):
    """A row that gives no training example, and why."""


class ShapeUnknown(Exception):
    """Columns that are of no shape, or of several.

    Attributes:
        why: what was found.
        fix: what to set.
    """

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(f"{why}; {fix}")
        self.why, self.fix = why, fix


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that hold the parts of an example; empty where the shape has no such part."""

    shape: Shape
    text: str = ""
    prompt: str = ""
    response: str = ""
    messages: str = ""
    chosen: str = ""
    rejected: str = ""
    system: str = ""
    tools: str = ""
    input: str = ""

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the columns that are read, in the order of a row's parts."""
        parts = (self.system, self.tools, self.prompt, self.input, self.messages, self.text, self.response)
        return tuple(name for name in (*parts, self.chosen, self.rejected) if name)


def detect_columns(
    columns: Sequence[str], text_columns: Sequence[str], *, shape: Shape | None, named: Mapping[str, str]
) -> Columns:
    """Return which columns hold what.

    Args:
        columns: of the rows.
        text_columns: those among them that hold text.
        shape: chosen by the user; ``None`` detects it.
        named: parts of an example and the columns that the user named for them (``prompt``: ``question``).

    Raises:
        ShapeUnknown: the columns fit no shape, or several.
    """
    missing = next(((part, name) for part, name in named.items() if name not in columns), None)
    if missing is not None:
        why = f"has no column {missing[1]}; it has {', '.join(columns) or 'none'}"
        raise ShapeUnknown(why, f"data.{missing[0]}_column: {did_you_mean(missing[1], columns)}")
    fitting = {one: found for one in SHAPES if (found := _FINDERS[one](columns, text_columns, named)) is not None}
    if shape is not None:
        if shape not in fitting:
            why = f"has no columns of {SHAPES[shape]}; it has {', '.join(columns) or 'none'}"
            raise ShapeUnknown(why, _how_to_name(shape))
        return fitting[shape]
    wanted = [one for one in fitting if set(named.values()) <= set(fitting[one].used)]
    for one in ("preference", "messages", "alpaca", "prompt_response", "text"):
        if one in wanted:
            others = [other for other in wanted if other != one and not _contains(fitting[one], fitting[other])]
            if others and not named:
                both = f"{SHAPES[one]} ({', '.join(fitting[one].used)})"
                other = f"{SHAPES[others[0]]} ({', '.join(fitting[others[0]].used)})"
                raise ShapeUnknown(f"has columns of {both} and of {other}", f"set data.shape={one}, or {others[0]}")
            return fitting[one]
    why = f"has the columns {', '.join(columns)}, which are of no known shape" if columns else "has no columns"
    if len(text_columns) == 1:
        raise ShapeUnknown(why, f"set data.text_column={text_columns[0]} to train on it as text")
    fix = "set data.text_column, data.messages_column, or data.prompt_column and data.response_column"
    raise ShapeUnknown(why, fix)


def shapes_with(part: str) -> tuple[Shape, ...]:
    """Return the shapes that have a part, as ``prompt``."""
    shapes: dict[str, tuple[Shape, ...]] = {
        "text": ("text",),
        "prompt": ("prompt_response", "preference"),
        "response": ("prompt_response",),
        "messages": ("messages",),
        "chosen": ("preference",),
        "rejected": ("preference",),
    }
    return shapes[part]


def _contains(one: Columns, other: Columns) -> bool:
    return bool(set(other.used) & set(one.used)) or (one.shape == "preference" and other.shape != "text")


def _how_to_name(shape: Shape) -> str:
    return {
        "text": "set data.text_column",
        "prompt_response": "set data.prompt_column and data.response_column",
        "messages": "set data.messages_column",
        "alpaca": "name them instruction, input and output, or set data.shape=prompt_response",
        "preference": "set data.chosen_column and data.rejected_column",
    }[shape]


def _first(names: Iterable[str], columns: Sequence[str]) -> str:
    return next((name for name in names if name in columns), "")


Finder = Callable[[Sequence[str], Sequence[str], Mapping[str, str]], Columns | None]


def _find_text(columns: Sequence[str], text_columns: Sequence[str], named: Mapping[str, str]) -> Columns | None:
    name = named.get("text") or _first(("text", "content"), columns)
    if not name and len(columns) == 1 and columns[0] in text_columns:
        name = columns[0]
    return Columns(shape="text", text=name) if name else None


def _find_prompt(columns: Sequence[str], text_columns: Sequence[str], named: Mapping[str, str]) -> Columns | None:
    prompt = named.get("prompt") or _first(_PROMPTS, columns)
    response = named.get("response") or _first(_RESPONSES, columns)
    if not prompt or not response:
        return None
    return Columns(
        shape="prompt_response",
        prompt=prompt,
        response=response,
        system=_first(("system", "system_prompt"), columns),
        tools=_first(("tools",), columns),
    )


def _find_messages(columns: Sequence[str], text_columns: Sequence[str], named: Mapping[str, str]) -> Columns | None:
    name = named.get("messages") or _first(_CONVERSATIONS, columns)
    if not name:
        return None
    system = _first(("system",), columns)
    return Columns(shape="messages", messages=name, system=system, tools=_first(("tools",), columns))


def _find_alpaca(columns: Sequence[str], text_columns: Sequence[str], named: Mapping[str, str]) -> Columns | None:
    if not {"instruction", "output"} <= set(columns):
        return None
    return Columns(
        shape="alpaca",
        prompt="instruction",
        input=_first(("input",), columns),
        response="output",
        system=_first(("system",), columns),
    )


def _find_preference(columns: Sequence[str], text_columns: Sequence[str], named: Mapping[str, str]) -> Columns | None:
    chosen, rejected = (
        named.get("chosen") or _first(("chosen",), columns),
        named.get("rejected") or _first(("rejected",), columns),
    )
    if not chosen or not rejected:
        return None
    prompt = named.get("prompt") or _first((*_PROMPTS, "instruction"), columns)
    return Columns(
        shape="preference", prompt=prompt, chosen=chosen, rejected=rejected, system=_first(("system",), columns)
    )


_FINDERS: dict[Shape, Finder] = {
    "text": _find_text,
    "prompt_response": _find_prompt,
    "messages": _find_messages,
    "alpaca": _find_alpaca,
    "preference": _find_preference,
}


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Makes training examples of rows."""

    columns: Columns
    template: ChatTemplate | None
    """``None`` leaves prompts and responses as they are, and cannot render conversations."""
    train_on: TrainOn = "assistant"

    def example(self, row: Mapping[str, Any]) -> Example:
        """Return the example of a row.

        Raises:
            BadRow: it has none, and why.
        """
        columns = self.columns
        if columns.shape == "text":
            return RenderedExample((TextSegment(_text(row, columns.text), True),))
        if columns.shape == "preference":
            return self._preference(row)
        if columns.shape == "messages":
            messages = conversation(_value(row, columns.messages), columns.messages)
            return self._chat(_with_system(messages, row, columns), row)
        prompt, response = _value(row, columns.prompt), _value(row, columns.response)
        if isinstance(prompt, list) or isinstance(response, list):
            before = conversation(prompt, columns.prompt) if isinstance(prompt, list) else [_user(prompt)]
            after = conversation(response, columns.response) if isinstance(response, list) else [_assistant(response)]
            return self._chat(_with_system([*before, *after], row, columns), row)
        before_text, answer = _prompt_text(row, columns), _text(row, columns.response)
        if self.template is not None:
            messages = [_user(before_text), _assistant(answer)]
            return self._chat(_with_system(messages, row, columns), row)
        head = f"{_text(row, columns.system)}\n\n" if columns.system and row.get(columns.system) else ""
        gap = "\n" if columns.shape == "alpaca" else ""
        trains_prompt = self.train_on == "all"
        segments = (TextSegment(f"{head}{before_text}{gap}", trains_prompt), TextSegment(answer, True))
        return RenderedExample(joined(segments))

    def _chat(self, messages: list[dict[str, Any]], row: Mapping[str, Any]) -> RenderedExample:
        if self.template is None:
            raise BadRow("holds a conversation, and there is no chat template")
        tools = _tools(row, self.columns.tools)
        if self.train_on != "all" and not any(message["role"] == "assistant" for message in messages):
            raise BadRow("has no assistant turn to train on")
        try:
            return self.template.render_example(messages, tools=tools, train_on=self.train_on)
        except TemplateFailed as failed:
            raise BadRow(str(failed)) from failed

    def _preference(self, row: Mapping[str, Any]) -> PreferencePair:
        columns = self.columns
        chosen, rejected = _value(row, columns.chosen), _value(row, columns.rejected)
        if chosen == rejected:
            raise BadRow(f"{columns.chosen} equals {columns.rejected}")
        prompt = row.get(columns.prompt) if columns.prompt else None
        if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
            return self._preference_of_texts(row, prompt, chosen, rejected)
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            if not isinstance(prompt, list):
                raise BadRow(f"{columns.chosen} and {columns.rejected} take two texts or two conversations")
            chosen = chosen if isinstance(chosen, list) else [_assistant(chosen)]
            rejected = rejected if isinstance(rejected, list) else [_assistant(rejected)]
        one, other = conversation(chosen, columns.chosen), conversation(rejected, columns.rejected)
        if isinstance(prompt, list):
            head = conversation(prompt, columns.prompt)
        elif isinstance(prompt, str) and not (one[:1] and one[0]["role"] in ("user", "system")):
            head = [_user(prompt)]
        else:
            shared = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            shared = min(len(one), len(other)) if shared is None else shared
            head, one, other = one[:shared], one[shared:], other[shared:]
        if not one or not other:
            raise BadRow(f"{columns.chosen} and {columns.rejected} differ in no turn")
        head = _with_system(head, row, columns)
        return self._pair(head, one, other)

    def _preference_of_texts(self, row: Mapping[str, Any], prompt: Any, chosen: str, rejected: str) -> PreferencePair:
        columns = self.columns
        if prompt is None:
            prompt, chosen, rejected = _shared_beginning(chosen, rejected)
            template = None  # the text holds its turns itself
        else:
            prompt, template = _text(row, columns.prompt), self.template
        for name, text in ((columns.chosen, chosen), (columns.rejected, rejected)):
            if not text.strip():
                raise BadRow(f"{name} has no text beyond the prompt" if not template else f"{name} is empty")
        if template is not None:
            head = _with_system([_user(prompt)], row, columns)
            return self._pair(head, [_assistant(chosen)], [_assistant(rejected)])
        before = TextSegment(prompt, False)
        return PreferencePair(
            RenderedExample(joined((before,))),
            RenderedExample(joined((before, TextSegment(chosen, True)))),
            RenderedExample(joined((before, TextSegment(rejected, True)))),
        )

    def _pair(
        self, head: list[dict[str, Any]], chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
    ) -> PreferencePair:
        if self.template is None:
            raise BadRow("holds conversations, and there is no chat template")
        try:
            prompt = self.template.render(head, add_generation_prompt=True)
            both = [self._answer(prompt, [*head, *answer]) for answer in (chosen, rejected)]
        except TemplateFailed as failed:
            raise BadRow(str(failed)) from failed
        return PreferencePair(RenderedExample(joined((TextSegment(prompt, False),)), True), *both)

    def _answer(self, prompt: str, messages: list[dict[str, Any]]) -> RenderedExample:
        assert self.template is not None, "checked by the caller"
        text = self.template.render(messages)
        if not text.startswith(prompt) or text == prompt:
            raise BadRow(f"{self.template.name} writes the prompt otherwise where an answer follows")
        return RenderedExample(joined((TextSegment(prompt, False), TextSegment(text[len(prompt) :], True))), True)


def conversation(value: Any, column: str) -> list[dict[str, Any]]:
    """Return the messages of a cell, as templates take them.

    ShareGPT's ``from`` and ``value`` become ``role`` and ``content``; parts of text are joined.

    Raises:
        BadRow: it is no conversation, and why.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)  # a table holds text alone
        except ValueError as error:
            raise BadRow(f"{column} is no list of messages: {error}") from error
    if not isinstance(value, list):
        raise BadRow(f"{column} takes a list of messages, and is {json_type(value)}")
    if not value:
        raise BadRow(f"{column} is empty")
    return [_message(message, f"{column}[{number}]") for number, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow(f"{place} takes an object with role and content, and is {json_type(message)}")
    if "role" not in message and "from" in message:
        role = _SHAREGPT_ROLES.get(str(message["from"]).lower())
        if role is None:
            raise BadRow(f"{place}.from={message['from']!r} is no known role ({', '.join(_SHAREGPT_ROLES)})")
        given = {"role": role, "content": message.get("value")}
    else:
        given = {name: message[name] for name in message if name in _MESSAGE_FIELDS}
    role = given.get("role")
    if role not in _ROLES:
        shown = "is missing" if "role" not in given else f"is {role!r}"
        raise BadRow(f"{place}.role {shown}; roles are {', '.join(_ROLES)}")
    given["role"] = "system" if role == "developer" else role
    content = given.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{place}.content[{number}]") for number, part in enumerate(content))
        given["content"] = content
    if content is None and role == "assistant" and given.get("tool_calls"):
        return given
    if not isinstance(content, str):
        raise BadRow(f"{place}.content takes text, and is {json_type(content)}")
    if not content.strip() and role == "assistant" and not given.get("tool_calls"):
        raise BadRow(f"{place}.content is empty")
    _check_characters(content, f"{place}.content")
    return given


def _part(part: Any, place: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    what = f"of type {part['type']}" if isinstance(part, Mapping) and "type" in part else json_type(part)
    raise BadRow(f"{place} takes text, and is {what}")


def _check_characters(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{place} contains half of a surrogate pair, which is not a character") from error


def _value(row: Mapping[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise BadRow(f"{column} is {'null' if column in row else 'missing'}")
    return row[column]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise BadRow(f"{column} takes text, and is {json_type(value)}")
    if not value.strip():
        raise BadRow(f"{column} is empty")
    _check_characters(value, column)
    return value


def _prompt_text(row: Mapping[str, Any], columns: Columns) -> str:
    more = row.get(columns.input) if columns.input else None
    if more is not None and not isinstance(more, str):
        raise BadRow(f"{columns.input} takes text, and is {json_type(more)}")
    prompt = _text(row, columns.prompt)
    return f"{prompt}\n\n{more}" if more and more.strip() else prompt


def _with_system(messages: list[dict[str, Any]], row: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    if not columns.system or not row.get(columns.system):
        return messages
    system = _text(row, columns.system)
    if any(message["role"] == "system" for message in messages):
        raise BadRow(f"has a system message in the conversation and another in {columns.system}")
    return [{"role": "system", "content": system}, *messages]


def _tools(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column) if column else None
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise BadRow(f"{column} is no JSON: {error}") from error
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
        raise BadRow(f"{column} takes a list of JSON schemas, and is {json_type(value)}")
    return value or None


def _user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": _as_text(text)}


def _assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": _as_text(text)}


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"takes text, and is {json_type(value)}")
    if not value.strip():
        raise BadRow("has an empty turn")
    return value


def _shared_beginning(one: str, other: str) -> tuple[str, str, str]:
    """Return the words that two texts begin with, and the rest of each."""
    most = min(len(one), len(other))
    at = next((place for place in range(most) if one[place] != other[place]), most)
    while at and not one[at - 1].isspace() and at < most:
        at -= 1
    return one[:at], one[at:], other[at:]
