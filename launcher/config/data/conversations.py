"""Conversations as rows hold them, in the form that chat templates take."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from launcher.config.data.rows import json_type
from launcher.utils.text import counted

Message = dict[str, Any]

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
    ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
)
_MARKS = ("weight", "train", "training", "loss")
"""Fields that say whether a turn is trained, of OpenAI, axolotl (two) and ms-swift."""
_PARTIAL_MARKS = ("train_detail", "training_detail")
_MARK = "train"
_IMAGE_PARTS = ("image", "image_url")
_IMAGE_DATA_KEYS, _IMAGE_KEYS = ("bytes", "base64"), ("path", "image", "url", "image_url")
"""Keys of a part that may hold the image; the first two are never paths."""
IMAGE_MARK = "<image>"
"""Text that stands for an image of the column ``images``, as LLaVA writes rows."""
_LIST_OF_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


class BadRow(Exception):
    """A row that gives no training example.

    Args:
        why: the reason.
        fix: what to do; empty where the reason says it.
        names_part: whether the reason begins with a part of the row, not with what the row does.
    """

    def __init__(self, why: str, fix: str = "", *, names_part: bool = False) -> None:
        super().__init__(why)
        self.fix, self._names_part = fix, names_part

    def at(self, place: str) -> str:
        """Return the place of the row and the reason."""
        return f"{place}: {self}" if self._names_part else f"{place} {self}"


class ToolArguments(dict[str, Any]):
    """Arguments of a tool call: an object to templates that ask for one, else JSON text.

    Most templates write ``arguments | tojson``; some add it to other text.
    """

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return f"{self}{other}"

    def __radd__(self, other: str) -> str:
        return f"{other}{self}"


def conversation(value: Any, column: str) -> list[Message]:
    """Return the messages of a cell, as templates take them.

    ShareGPT's ``from`` and ``value`` become ``role`` and ``content``; parts of text are joined; arguments of tool calls
    become objects. A mark that a turn is trained or not stays, for :func:`take_marks`. A message with images keeps its
    parts, for :func:`place_images`.

    Raises:
        BadRow: it is no conversation, and why.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)  # a table holds text alone
        except ValueError as error:
            _refuse_text(value, column, error)
    if not isinstance(value, list):
        raise BadRow(f"{column} takes a list of messages, and is {json_type(value)}")
    if not value:
        raise BadRow(f"{column} is empty")
    return [_message(message, f"{column}[{number}]") for number, message in enumerate(value)]


def decoded(value: Any, column: str) -> Any:
    """Return a cell that holds text or a conversation: JSON text of messages becomes their list.

    Other text stays as it is, JSON or not.

    Raises:
        BadRow: it is the text of a list of messages, and no JSON.
    """
    if isinstance(value, Mapping) and _is_message(value):
        return [value]
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        found = json.loads(value)
    except ValueError as error:
        if _LIST_OF_MESSAGES.match(value):
            _refuse_text(value, column, error)
        return value
    found = [found] if isinstance(found, Mapping) else found
    return found if isinstance(found, list) and found and all(map(_is_message, found)) else value


def take_marks(messages: Iterable[Message]) -> dict[int, bool]:
    """Remove the marks from messages; return for each marked turn whether it is to be trained."""
    return {number: message.pop(_MARK) for number, message in enumerate(messages) if _MARK in message}


def tools_of(value: Any, column: str) -> list[Mapping[str, Any]] | None:
    """Return the JSON schemas of tools that a cell holds; ``None`` without any.

    Raises:
        BadRow: it holds something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise BadRow(f"{column} is no JSON: {error}") from error
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
        raise BadRow(f"{column} takes a list of JSON schemas, and is {json_type(value)}")
    return value or None


def history_of(value: Any, column: str) -> list[Message]:
    """Return the earlier turns that a cell holds: pairs of a prompt and a response, or messages.

    Raises:
        BadRow: it holds something else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f"{column} is no JSON: {error}") from error
    if not value:
        return []
    if isinstance(value, list) and all(map(_is_message, value)):
        return conversation(value, column)
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRow(f"{column} takes pairs of a prompt and a response, and is {json_type(value)}")
    return [turn for prompt, response in value for turn in (user_turn(prompt), assistant_turn(response))]


def user_turn(text: Any) -> Message:
    """Return a message of the user.

    Raises:
        BadRow: it is no text, or empty.
    """
    return {"role": "user", "content": _as_text(text)}


def assistant_turn(text: Any) -> Message:
    """Return a message of the assistant.

    Raises:
        BadRow: it is no text, or empty.
    """
    return {"role": "assistant", "content": _as_text(text)}


def check_characters(text: str, place: str) -> None:
    """Raise where text holds what is no character.

    Raises:
        BadRow: half of a surrogate pair is in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{place} contains half of a surrogate pair, which is not a character") from error


def _refuse_text(value: str, column: str, error: ValueError) -> NoReturn:
    if re.match(r"\s*\[\s*\{\s*'", value):
        raise BadRow(
            f"{column} is a list as Python prints it, not JSON", f"write {column} by json.dumps, or as Parquet"
        ) from error
    raise BadRow(f"{column} is no list of messages: {error}") from error


def _is_message(value: Any) -> bool:
    """Return whether a value has the fields of a message."""
    return isinstance(value, Mapping) and (
        ("role" in value and bool({"content", "tool_calls"} & value.keys())) or {"from", "value"} <= value.keys()
    )


def _message(message: Any, place: str) -> Message:
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
    if (is_trained := _mark_of(message, place)) is not None:
        given[_MARK] = is_trained
    if given.get("tool_calls"):
        given["tool_calls"] = _tool_calls(given["tool_calls"], f"{place}.tool_calls")
    content = given.get("content")
    if isinstance(content, list):
        parts = [_part(part, f"{place}.content[{number}]") for number, part in enumerate(content)]
        if any(part["type"] == "image" for part in parts):
            given["content"] = parts
            return given
        content = given["content"] = "".join(part["text"] for part in parts)
    if content is None and role == "assistant" and given.get("tool_calls"):
        return given
    if not isinstance(content, str):
        raise BadRow(f"{place}.content takes text, and is {json_type(content)}")
    if not content.strip() and role == "assistant" and not given.get("tool_calls"):
        raise BadRow(f"{place}.content is empty")
    check_characters(content, f"{place}.content")
    return given


def _mark_of(message: Mapping[str, Any], place: str) -> bool | None:
    """Return whether a message says that it is trained; ``None`` where it says nothing."""
    for name in _PARTIAL_MARKS:
        if message.get(name):
            raise BadRow(f"{place}.{name} marks parts of a turn, and a turn is trained whole or not at all")
    marks = {name: message[name] for name in _MARKS if message.get(name) is not None}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRow(f"{place}.{name} takes 0 or 1, true or false, and is {value!r}")
    if len(set(map(bool, marks.values()))) > 1:
        raise BadRow(f"{place} says both that it is trained and that it is not ({', '.join(marks)})")
    return next(map(bool, marks.values()), None)


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Return tool calls whose arguments are objects; OpenAI writes them as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow(f"{place} takes a list of tool calls, and is {json_type(calls)}")
    found = []
    for number, call in enumerate(calls):
        given = dict(call)
        where = f"{place}[{number}]"
        if isinstance(call.get("function"), Mapping):
            given["function"] = _with_arguments(call["function"], f"{where}.function")
        else:
            given = _with_arguments(given, where)
        found.append(given)
    return found


def _with_arguments(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise BadRow(f"{place}.arguments is no JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise BadRow(f"{place}.arguments takes a JSON object, and is {json_type(arguments)}")
    return {**function, "arguments": ToolArguments(arguments)} if isinstance(arguments, dict) else dict(function)


def place_images(messages: Sequence[Message], column: str, given: Sequence[Any]) -> list[Any]:
    """Return the images of messages in order; an empty part stays in the place of each.

    Images of a column of their own stand where a part names none, or where the text has ``<image>``; without any such
    place they stand before the text of the first turn of the user.

    Args:
        messages: changed in place.
        column: that holds ``given``, for messages.
        given: images of the row beside its messages.

    Raises:
        BadRow: there are more or fewer images than places.
    """
    has_parts = any(isinstance(message.get("content"), list) for message in messages)
    if given and not has_parts:
        _make_places(messages)
    rest, found, num_places = iter(given), list[Any](), 0
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part["type"] != "image":
                continue
            num_places += part["image"] is None
            found.append(next(rest, None) if part["image"] is None else part["image"])
            del part["image"]
    if num_places != len(given):
        what = f"its column {column} holds {counted(len(given), 'image')}" if column else "no column images holds any"
        places = counted(num_places, "place")
        raise BadRow(f"has {places} for images that its messages do not name, and {what}")
    return found


def _make_places(messages: Sequence[Message]) -> None:
    """Make a part for each image mark in the texts; without any, the first turn begins with one."""
    texts = [message for message in messages if isinstance(message.get("content"), str)]
    if any(IMAGE_MARK in message["content"] for message in texts):
        for message in texts:
            pieces = message["content"].split(IMAGE_MARK)
            if len(pieces) > 1:
                parts = [part for text in pieces for part in ({"type": "image", "image": None}, _text_part(text))][1:]
                message["content"] = [part for part in parts if part["type"] == "image" or part["text"]]
        return
    first = next((message for message in texts if message["role"] == "user"), None)
    if first is not None:
        first["content"] = [{"type": "image", "image": None}, _text_part(first["content"])]


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _part(part: Any, place: str) -> dict[str, Any]:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        check_characters(part["text"], place)
        return _text_part(str(part["text"]))
    if isinstance(part, Mapping) and part.get("type") in _IMAGE_PARTS:
        data = next(({key: part[key]} for key in _IMAGE_DATA_KEYS if part.get(key) is not None), None)
        named = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
        return {"type": "image", "image": data or named}
    what = f"of type {part['type']}" if isinstance(part, Mapping) and "type" in part else json_type(part)
    raise BadRow(f"{place} takes text, and is {what}")


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"takes text, and is {json_type(value)}")
    if not value.strip():
        raise BadRow("has an empty turn")
    return value
