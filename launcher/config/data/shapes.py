"""What the rows of a data set are: text, prompt and response, conversations, or preferences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from launcher.config.data.chat_template import ChatTemplate, TemplateFailed, TrainOn
from launcher.config.data.conversations import (
    BadRow,
    Message,
    assistant_turn,
    check_characters,
    conversation,
    decoded,
    history_of,
    place_images,
    take_marks,
    tools_of,
    user_turn,
)
from launcher.config.data.examples import Example, PreferencePair, RenderedExample, TextSegment, joined
from launcher.config.data.images import BadImage
from launcher.config.data.rows import json_type
from launcher.utils.text import counted, did_you_mean, shell_word

if TYPE_CHECKING:
    from launcher.config.data.images import EncodedImage, ImageReader

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
_BY_DETAIL: tuple[Shape, ...] = ("preference", "messages", "alpaca", "prompt_response", "text")
"""Shapes in the order in which they are tried: the first that fits is taken."""
_LABELS = ("label", "kto_tag")
"""Columns that say whether a response is good, where they are true or false."""

Part = Literal["images", "system", "tools", "history", "input", "prompt", "messages"]
_IMAGES = ("images", "image")
TEXT_ALONE = "holds images, and the model takes text alone"
IMAGE_MODEL = "choose a model that takes images: model=hf with LLaVA, Idefics3, SmolVLM or Qwen2-VL"
_OPTIONAL: dict[Shape, dict[Part, tuple[str, ...]]] = {
    "text": {},
    "prompt_response": {
        "images": _IMAGES,
        "system": ("system", "system_prompt"),
        "tools": ("tools",),
        "history": ("history",),
    },
    "messages": {"images": _IMAGES, "system": ("system", "system_prompt"), "tools": ("tools",)},
    "alpaca": {
        "images": _IMAGES,
        "system": ("system", "system_prompt"),
        "tools": ("tools",),
        "history": ("history",),
        "input": ("input",),
    },
    "preference": {
        "images": _IMAGES,
        "system": ("system", "system_prompt"),
        "tools": ("tools",),
        "prompt": (*_PROMPTS, "instruction"),
        "messages": _CONVERSATIONS,
    },
}
"""Columns that a row may have or not.

They are looked for in each row: a file may first have one after many rows.
"""


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
    seen: tuple[str, ...] = field(default=(), compare=False)
    """All columns of the first rows."""

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the columns that every row has, in the order of a row's parts."""
        parts = (self.prompt, self.messages, self.text, self.response, self.chosen, self.rejected)
        return tuple(name for name in parts if name)

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the columns that are read and that the first rows have, in a row's order."""
        seen = {part: [name for name in self.optional(part) if name in self.seen] for part in _OPTIONAL[self.shape]}
        parts: tuple[Part, ...] = ("images", "system", "tools", "history", "messages", "prompt")
        before = [name for part in parts for name in seen.get(part, ())]
        prompt = (self.prompt,) if self.prompt else ()
        return (*before, *prompt, *seen.get("input", ()), *(name for name in self.required if name not in prompt))

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the columns that are not read."""
        used = self.used
        return tuple(name for name in self.seen if name not in used)

    @property
    def readable(self) -> tuple[str, ...]:
        """Names of all columns that decide about an example, where a row has them."""
        optional = (name for part in _OPTIONAL[self.shape] for name in self.optional(part))
        return (*self.required, *optional, *(self.labels if _OPTIONAL[self.shape] else ()))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of columns that say whether a response is good."""
        return tuple(name for name in _LABELS if name not in self.required)

    def optional(self, part: Part) -> tuple[str, ...]:
        """Return the names under which a row may have an optional part."""
        if getattr(self, part, ""):
            return ()
        return tuple(name for name in _OPTIONAL[self.shape].get(part, ()) if name not in self.required)


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
    fitting = {
        one: replace(found, seen=tuple(columns))
        for one in SHAPES
        if (found := _FINDERS[one](columns, text_columns, named)) is not None
    }
    if shape is not None:
        if shape not in fitting:
            why = f"has no columns of {SHAPES[shape]}; it has {', '.join(columns) or 'none'}"
            raise ShapeUnknown(why, _how_to_name(shape))
        return _without_repetition(fitting[shape])
    wanted = [one for one in fitting if all(getattr(fitting[one], part) == name for part, name in named.items())]
    for one in _BY_DETAIL:
        if one in wanted:
            others = [other for other in wanted if other != one and not _contains(fitting[one], fitting[other])]
            if others and not named:
                both = f"{SHAPES[one]} ({', '.join(fitting[one].required)})"
                other = f"{SHAPES[others[0]]} ({', '.join(fitting[others[0]].required)})"
                raise ShapeUnknown(f"has columns of {both} and of {other}", f"set data.shape={one}, or {others[0]}")
            return _without_repetition(fitting[one])
    why = f"has the columns {', '.join(columns)}, which are of no known shape" if columns else "has no columns"
    if fitting and named:
        given = " ".join(f"data.{part}_column={name}" for part, name in named.items())
        most = next(one for one in _BY_DETAIL if one in fitting)
        why = f"has the columns {', '.join(columns)}; {given} fits no shape of them"
        raise ShapeUnknown(why, f"leave it out to train on {SHAPES[most]} ({', '.join(fitting[most].required)})")
    if (hint := _likely_names(columns)) is not None:
        raise ShapeUnknown(why, f"if that is meant, set {hint}")
    if len(text_columns) == 1:
        raise ShapeUnknown(why, f"set data.text_column={text_columns[0]} to train on it as text")
    fix = "set data.text_column, data.messages_column, or data.prompt_column and data.response_column"
    raise ShapeUnknown(why, fix)


def _without_repetition(columns: Columns) -> Columns:
    """Return columns, each of which holds one part.

    Raises:
        ShapeUnknown: one would hold two.
    """
    parts = ("text", "prompt", "response", "messages", "chosen", "rejected")
    holders: dict[str, str] = {}
    for part in parts:
        name = getattr(columns, part)
        if name in holders:
            why = f"would have its {holders[name]} and its {part} in one column, {name}"
            raise ShapeUnknown(why, f"name another column by data.{holders[name]}_column or data.{part}_column")
        if name:
            holders[name] = part
    return columns


def _likely_names(columns: Sequence[str]) -> str | None:
    """Return the options that name columns whose names are nearly known."""
    plain = {name.strip().lower(): name for name in reversed(columns)}
    for parts in (
        {"messages": _CONVERSATIONS},
        {"chosen": ("chosen",), "rejected": ("rejected",)},
        {"prompt": (*_PROMPTS, "instruction", "input"), "response": _RESPONSES},
        {"text": ("text", "content")},
    ):
        found = {part: plain[name] for part, names in parts.items() if (name := _first(names, list(plain)))}
        if len(found) == len(parts):
            return " ".join(shell_word(f"data.{part}_column={_hydra_word(name)}") for part, name in found.items())
    return None


def _hydra_word(name: str) -> str:
    """Return a column's name as an override takes it."""
    return (
        name if re.fullmatch(r"[A-Za-z_][\w-]*", name) else "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"
    )


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
    return bool(set(other.required) & set(one.required)) or (one.shape == "preference" and other.shape != "text")


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
    return Columns(shape="prompt_response", prompt=prompt, response=response)


def _find_messages(columns: Sequence[str], text_columns: Sequence[str], named: Mapping[str, str]) -> Columns | None:
    name = named.get("messages") or _first(_CONVERSATIONS, columns)
    return Columns(shape="messages", messages=name) if name else None


def _find_alpaca(columns: Sequence[str], text_columns: Sequence[str], named: Mapping[str, str]) -> Columns | None:
    if not {"instruction", "output"} <= set(columns):
        return None
    return Columns(shape="alpaca", prompt="instruction", response="output")


def _find_preference(columns: Sequence[str], text_columns: Sequence[str], named: Mapping[str, str]) -> Columns | None:
    chosen, rejected = (
        named.get("chosen") or _first(("chosen",), columns),
        named.get("rejected") or _first(("rejected",), columns),
    )
    if not chosen or not rejected:
        return None
    prompt = named.get("prompt") or _first((*_PROMPTS, "instruction"), columns)
    return Columns(shape="preference", prompt=prompt, chosen=chosen, rejected=rejected)


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
    images: ImageReader | None = None
    """Finds the images that rows name; ``None`` refuses rows with images."""

    def example(self, row: Mapping[str, Any]) -> Example:
        """Return the example of a row.

        Raises:
            BadRow: it has none, and why.
        """
        columns = self.columns
        if columns.shape == "text":
            return RenderedExample((TextSegment(_text(row, columns.text), True),))
        if columns.shape == "preference":
            if _given_images(row, columns)[1]:
                raise BadRow("holds images beside preferences, which are trained on text alone")
            return self._preference(row)
        _check_labels(row, columns)
        if columns.shape == "messages":
            messages = conversation(_value(row, columns.messages), columns.messages)
            return self._chat(_with_system(messages, row, columns), row)
        return self._response(row)

    def _response(self, row: Mapping[str, Any]) -> RenderedExample:
        """Return the example of a prompt with its response."""
        columns = self.columns
        prompt, response = _value(row, columns.prompt), _value(row, columns.response)
        if columns.shape == "prompt_response":
            prompt, response = decoded(prompt, columns.prompt), decoded(response, columns.response)
        earlier = next((history_of(row[name], name) for name in columns.optional("history") if row.get(name)), [])
        if isinstance(prompt, list) or isinstance(response, list):
            before = conversation(prompt, columns.prompt) if isinstance(prompt, list) else [user_turn(prompt)]
            after = (
                conversation(response, columns.response) if isinstance(response, list) else [assistant_turn(response)]
            )
            return self._chat(_with_system([*earlier, *before, *after], row, columns), row)
        before_text, answer = _prompt_text(row, columns), _text(row, columns.response)
        if self.template is not None or earlier:
            messages = [*earlier, user_turn(before_text), assistant_turn(answer)]
            return self._chat(_with_system(messages, row, columns), row)
        if _given_images(row, columns)[1]:
            raise BadRow("holds images, and there is no chat template that places them", IMAGE_MODEL)
        if _tools(row, columns):
            raise BadRow("has tools, and there is no chat template that writes them")
        gap = "\n" if columns.shape == "alpaca" else ""
        trains_prompt = self.train_on == "all"
        head = _system_text(row, columns)
        segments = (TextSegment(f"{head}{before_text}{gap}", trains_prompt), TextSegment(answer, True))
        return RenderedExample(joined(segments))

    def _chat(self, messages: list[Message], row: Mapping[str, Any]) -> RenderedExample:
        if self.template is None:
            raise BadRow("holds a conversation, and there is no chat template")
        tools = _tools(row, self.columns)
        images = self._images(messages, row)
        marks = take_marks(messages)
        untrained = frozenset(number for number, is_trained in marks.items() if not is_trained)
        assistant = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "all":
            wrong = next((number for number in sorted(untrained) if number not in assistant), None)
            if wrong is not None:
                turn = f"turn {wrong + 1} ({messages[wrong]['role']})"
                raise BadRow(
                    f"{turn} is marked not to be trained, and data.train_on=all leaves out assistant turns alone"
                )
        else:
            wrong = next(
                (number for number, is_trained in marks.items() if is_trained and number not in assistant), None
            )
            if wrong is not None:
                turn = f"turn {wrong + 1} ({messages[wrong]['role']})"
                raise BadRow(
                    f"{turn} is marked to be trained, and data.train_on={self.train_on} trains assistant turns"
                )
            if not assistant:
                raise BadRow("has no assistant turn to train on")
            if untrained.issuperset(assistant[-1:] if self.train_on == "last" else assistant):
                which = "the last one is" if self.train_on == "last" else "all are"
                raise BadRow(f"has no assistant turn to train on: {which} marked not to be trained")
        try:
            found = self.template.render_example(messages, tools=tools, train_on=self.train_on, untrained=untrained)
        except TemplateFailed as failed:
            raise BadRow(str(failed)) from failed
        token = self.template.image_token
        if token and (written := found.text.count(token)) != len(images):
            why = f"gives a text with {written} × {token}, which stands for an image, and has "
            why += counted(len(images), "image")
            raise BadRow(why, f"take {token} out of its text")
        return replace(found, images=images)

    def _images(self, messages: list[Message], row: Mapping[str, Any]) -> tuple[EncodedImage, ...]:
        """Return the images of a conversation, whose messages then hold places for them."""
        assert self.template is not None, "checked by the caller"
        column, given = _given_images(row, self.columns)
        if not given and not any(isinstance(message.get("content"), list) for message in messages):
            return ()
        if self.images is None or not self.template.image_token:
            raise BadRow(TEXT_ALONE, IMAGE_MODEL)
        found = place_images(messages, column, given)
        try:
            return tuple(self.images.find(value, f"image {number}") for number, value in enumerate(found, 1))
        except BadImage as bad:
            raise BadRow(str(bad), bad.fix, names_part=True) from bad

    def _preference(self, row: Mapping[str, Any]) -> PreferencePair:
        columns = self.columns
        chosen, rejected = (
            decoded(_value(row, columns.chosen), columns.chosen),
            decoded(_value(row, columns.rejected), columns.rejected),
        )
        if chosen == rejected:
            raise BadRow(f"{columns.chosen} equals {columns.rejected}")
        name, prompt = _prompt_of(row, columns)
        if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
            return self._preference_of_texts(row, name, chosen, rejected)
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            if not isinstance(prompt, list):
                raise BadRow(f"{columns.chosen} and {columns.rejected} take two texts or two conversations")
            chosen = chosen if isinstance(chosen, list) else [assistant_turn(chosen)]
            rejected = rejected if isinstance(rejected, list) else [assistant_turn(rejected)]
        one, other = conversation(chosen, columns.chosen), conversation(rejected, columns.rejected)
        begins_whole = one[0]["role"] in ("user", "system")
        if prompt is None and not begins_whole:
            name = next((one for one in columns.optional("messages") if row.get(one) is not None), "")
            if not name:
                raise BadRow(
                    f"{columns.chosen} begins with the {one[0]['role']}'s turn, and no column holds its prompt"
                )
            prompt = decoded(row[name], name)
        if isinstance(prompt, list):
            head = conversation(prompt, name)
            if one[: len(head)] == head and other[: len(head)] == head:
                one, other = one[len(head) :], other[len(head) :]
        elif isinstance(prompt, str) and not begins_whole:
            head = [user_turn(prompt)]
        else:
            shared = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            shared = min(len(one), len(other)) if shared is None else shared
            head, one, other = one[:shared], one[shared:], other[shared:]
        if not one or not other:
            raise BadRow(f"{columns.chosen} and {columns.rejected} differ in no turn")
        return self._pair(_with_system(head, row, columns), one, other, _tools(row, columns))

    def _preference_of_texts(self, row: Mapping[str, Any], column: str, chosen: str, rejected: str) -> PreferencePair:
        columns = self.columns
        if column:
            prompt, template = _text(row, column), self.template
        else:
            prompt, chosen, rejected = _shared_beginning(chosen, rejected)
            template = None  # the text holds its turns itself
        for name, text in ((columns.chosen, chosen), (columns.rejected, rejected)):
            if not text.strip():
                raise BadRow(f"{name} has no text beyond the prompt" if not template else f"{name} is empty")
        tools = _tools(row, columns)
        if template is not None:
            head = _with_system([user_turn(prompt)], row, columns)
            return self._pair(head, [assistant_turn(chosen)], [assistant_turn(rejected)], tools)
        if tools:
            missing = "there is no chat template that writes them" if column else "no prompt to write them before"
            raise BadRow(f"has tools, and {missing}")
        before = TextSegment(f"{_system_text(row, columns)}{prompt}", False)
        return PreferencePair(
            RenderedExample(joined((before,))),
            RenderedExample(joined((before, TextSegment(chosen, True)))),
            RenderedExample(joined((before, TextSegment(rejected, True)))),
        )

    def _pair(self, head: list[Message], chosen: list[Message], rejected: list[Message], tools: Any) -> PreferencePair:
        if self.template is None:
            raise BadRow("holds conversations, and there is no chat template")
        take_marks(head)  # a prompt is not trained
        if not all([*take_marks(chosen).values(), *take_marks(rejected).values()]):
            raise BadRow("marks a turn of an answer as not to be trained, and a preference is about whole answers")
        try:
            prompt = self.template.render(head, tools=tools, add_generation_prompt=True)
            both = [self._answer(prompt, [*head, *answer], tools) for answer in (chosen, rejected)]
        except TemplateFailed as failed:
            raise BadRow(str(failed)) from failed
        return PreferencePair(RenderedExample(joined((TextSegment(prompt, False),)), True), *both)

    def _answer(self, prompt: str, messages: list[Message], tools: Any) -> RenderedExample:
        assert self.template is not None, "checked by the caller"
        text = self.template.render(messages, tools=tools)
        if not text.startswith(prompt) or text == prompt:
            raise BadRow(f"{self.template.name} writes the prompt otherwise where an answer follows")
        return RenderedExample(joined((TextSegment(prompt, False), TextSegment(text[len(prompt) :], True))), True)


def _check_labels(row: Mapping[str, Any], columns: Columns) -> None:
    """Raise where a row says whether its response is good: a bad one would be learnt.

    Raises:
        BadRow: it does.
    """
    for name in columns.labels:
        value = row.get(name)
        if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false")):
            why = f"has {name}={str(value).lower()}, which tells good responses from bad ones, and each would be learnt"
            raise BadRow(why, f"keep the rows whose {name} is true, and remove the column {name}")


def _prompt_of(row: Mapping[str, Any], columns: Columns) -> tuple[str, Any]:
    """Return the column with the prompt of a preference, and what is in it."""
    names = (columns.prompt,) if columns.prompt else columns.optional("prompt")
    name = next((one for one in names if row.get(one) is not None), "")
    return name, decoded(row[name], name) if name else None


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
    check_characters(value, column)
    return value


def _prompt_text(row: Mapping[str, Any], columns: Columns) -> str:
    prompt = _text(row, columns.prompt)
    for name in columns.optional("input"):
        more = row.get(name)
        if more is not None and not isinstance(more, str):
            raise BadRow(f"{name} takes text, and is {json_type(more)}")
        if more and more.strip():
            return f"{prompt}\n\n{more}"
    return prompt


def _system(row: Mapping[str, Any], columns: Columns) -> str:
    """Return the system prompt that stands in a column of its own; empty without one."""
    found = {name: _text(row, name) for name in columns.optional("system") if row.get(name)}
    if len(set(found.values())) > 1:
        raise BadRow(f"has one system prompt in {' and another in '.join(found)}")
    return next(iter(found.values()), "")


def _system_text(row: Mapping[str, Any], columns: Columns) -> str:
    """Return what stands before a prompt that no template writes."""
    system = _system(row, columns)
    return f"{system}\n\n" if system else ""


def _with_system(messages: list[Message], row: Mapping[str, Any], columns: Columns) -> list[Message]:
    system = _system(row, columns)
    if not system:
        return messages
    if any(message["role"] == "system" for message in messages):
        name = next(name for name in columns.optional("system") if row.get(name))
        raise BadRow(f"has a system message in the conversation and another in {name}")
    return [{"role": "system", "content": system}, *messages]


def holds_images(row: Mapping[str, Any], columns: Columns) -> bool:
    """Return whether a conversation has images, or a column beside it."""
    if _given_images(row, columns)[1]:
        return True
    try:
        messages = conversation(decoded(row.get(columns.messages), columns.messages), columns.messages)
    except BadRow:
        return False
    return any(isinstance(message.get("content"), list) for message in messages)


def _given_images(row: Mapping[str, Any], columns: Columns) -> tuple[str, list[Any]]:
    """Return the column of a row's images and what is in it; empty without any."""
    name = next((name for name in columns.optional("images") if row.get(name)), "")
    value = row.get(name)
    return name, list(value) if isinstance(value, list) else [value] if value else []


def _tools(row: Mapping[str, Any], columns: Columns) -> Any:
    return next((found for name in columns.optional("tools") if (found := tools_of(row.get(name), name))), None)


def _shared_beginning(one: str, other: str) -> tuple[str, str, str]:
    """Return the words that two texts begin with, and the rest of each.

    Where one text is the beginning of the other, its last word is its answer, unless it ends as a prompt does.
    """
    most = min(len(one), len(other))
    at = next((place for place in range(most) if one[place] != other[place]), most)
    if at == most and one[at - 1 : at] in (":", ">"):
        return one[:at], one[at:], other[at:]
    while at and not one[at - 1].isspace():
        at -= 1
    return one[:at], one[at:], other[at:]
