"""Chat templates: conversations to text, and which of it the assistant wrote.

Text is what Transformers renders.
Imports jinja2 alone. A template is a program that comes with a model, so it runs in jinja2's sandbox.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from launcher.config.data.bpe import END
from launcher.config.data.conversations import IMAGE_MARK
from launcher.config.data.examples import RenderedExample, TextSegment, joined
from launcher.config.model.image_text import has_processor, read_image_text
from launcher.errors import ConfigError
from launcher.utils.files import read_object, write_atomic
from launcher.utils.text import did_you_mean

TrainOn = Literal["assistant", "last", "all"]
Messages = Sequence[Mapping[str, Any]]

_START, _STOP = "\ue000generation\ue001", "\ue000end\ue001"
"""Marks around generated text while a template runs."""
DEFAULT_TEMPLATE = "default"
"""The template that is used where none is named, as Transformers has it."""
_DEFAULT_FILE, _NAMED_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
"""Of a tokenizer's folder: its default template, and a folder of those with other names."""
_OF_PROCESSOR = "chat_template.json"
"""File in which older processors of image-text models have their template."""
_SENTINEL = "launcher-content-of-this-turn"
_WRITES_TOOLS = re.compile(r"\btools\b")
_WRITES_TOOL_CALLS = re.compile(r"\btool_calls\b|\b(message|messages|msg|m)\s*\|\s*tojson")
_STAND_IN = """\
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- generation %}{{ message['content'] or '' }}{{ message['tool_calls'] | tojson if message['tool_calls'] }}
    {%- endgeneration %}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""


class TemplateFailed(Exception):
    """A chat template cannot write a conversation down, and why."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it writes."""

    source: str
    """Jinja."""
    name: str = "chat template"
    """For messages."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Variables of the template: ``bos_token``, ``eos_token``, …"""
    image_token: str = ""
    """What stands for an image in the text; empty of a model that takes text alone."""

    @property
    def label(self) -> str:
        """The name alone, for tables."""
        return self.name.removeprefix("the chat template ").replace("the tokenizer's chat template", "of the tokenizer")

    def render(self, messages: Messages, *, tools: Any = None, add_generation_prompt: bool = False) -> str:
        """Return a conversation as text.

        Args:
            messages: each with a role, and what the template reads of it.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            TemplateFailed: the template refuses these messages, or is faulty.
        """
        return self._render(messages, tools, add_generation_prompt)

    def render_example(
        self, messages: Messages, *, tools: Any = None, train_on: TrainOn, untrained: Collection[int] = ()
    ) -> RenderedExample:
        """Return a conversation in segments; the loss counts the turns that ``train_on`` names.

        The trained text is what stands between the template's ``{% generation %}`` marks. A template without marks is
        rendered up to each assistant turn and up to its end; both must be beginnings of the whole text. If one is not
        (a template that removes earlier reasoning, say), the turn's content is replaced by a mark, and the text around
        the mark must be the beginning and the end of the whole.

        Args:
            messages: each with a role, and what the template reads of it.
            tools: JSON schemas of functions that the model may call.
            train_on: which turns count.
            untrained: numbers of assistant turns that do not count all the same.

        Raises:
            TemplateFailed: the template refuses these messages, or the text of a turn cannot be found exactly.
        """
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "all":
            text, spans = self._spans_of_turns(messages, [turn for turn in turns if turn in untrained], tools)
            segments = (TextSegment(one.text, not one.is_trained) for one in _segments(text, spans, self.name))
            return RenderedExample(tuple(segments), has_special_tokens=True)
        if not turns:
            raise TemplateFailed("has no assistant turn to train on")
        wanted = turns[-1:] if train_on == "last" else turns
        if self.has_generation_marks:
            text, spans = self._marked_spans(messages, tools)
            if train_on == "last":
                before = self._prefix(messages[: wanted[0]], tools, text, generation=False)
                after = [] if before is None else [span for span in spans if span[0] >= len(before)]
                spans = after or spans[-1:]
            left_out = [
                self._marked_of(messages, number, tools, text, spans) for number in wanted if number in untrained
            ]
            spans = [span for span in spans if not any(span in turn for turn in left_out)]
        else:
            text, spans = self._spans_of_turns(messages, [turn for turn in wanted if turn not in untrained], tools)
        return RenderedExample(_segments(text, spans, self.name), has_special_tokens=True)

    def syntax_problem(self) -> str | None:
        """Return why the source is no valid Jinja; ``None`` if it is."""
        import jinja2

        try:
            _compile(self.source)
        except jinja2.TemplateSyntaxError as error:
            return f"line {error.lineno}: {error.message}"
        return None

    @functools.cached_property
    def turn_end(self) -> str:
        """What ends an assistant's turn, without white space around it; empty where nothing does."""
        answer = "answer"
        try:
            example = self.render_example(
                [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}],
                train_on="assistant",
            )
        except TemplateFailed:  # it takes other conversations alone
            return ""
        trained = "".join(segment.text for segment in example.segments if segment.is_trained)
        return trained.rpartition(answer)[2].strip()

    @functools.cached_property
    def has_generation_marks(self) -> bool:
        """Whether the template marks what the assistant generates."""
        return bool(self._compiled.is_marked)

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template reads messages whose content is a list of parts."""
        import jinja2

        messages = [{"role": "user", "content": [{"type": "text", "text": _SENTINEL}]}]
        values = {**self.special_tokens, "tools": None, "documents": None, "messages": messages}
        try:
            text, _ = self._compiled.render({**values, "add_generation_prompt": False}, marks=False)
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, jinja2.TemplateError):
            return False
        return _SENTINEL in text and "'type'" not in text and '"type"' not in text

    def _with_images(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages of an image-text model in the form that its template reads."""
        if not self.image_token:
            return messages
        for message in messages:
            content = message.get("content")
            if self.takes_parts and isinstance(content, str):
                message["content"] = [{"type": "text", "text": content}]
            elif not self.takes_parts and isinstance(content, list):
                message["content"] = "".join(part.get("text", self.image_token) for part in content)
        return messages

    @functools.cached_property
    def _compiled(self) -> _Compiled:
        return _compile(self.source)

    def _render(self, messages: Messages, tools: Any, add_generation_prompt: bool) -> str:
        return self._rendered(messages, tools, add_generation_prompt, marks=False)[0]

    def _rendered(self, messages: Messages, tools: Any, add_generation_prompt: bool, *, marks: bool) -> tuple[str, int]:
        """Return a conversation as text, and how many times generated text stands in it."""
        import jinja2

        if (unwritten := self._unwritten(messages, tools)) is not None:
            fix = "take the template of a model that calls tools"
            raise TemplateFailed(f"has {unwritten}, and {self.name} writes none: {fix}")
        values = {**self.special_tokens, "tools": tools, "documents": None}
        values["messages"] = self._with_images(_plain(messages))
        try:
            return self._compiled.render({**values, "add_generation_prompt": add_generation_prompt}, marks=marks)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailed(f"{self.name} is no valid template: line {error.lineno}: {error.message}") from error
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise TemplateFailed(f"{self.name} fails: {type(error).__name__}: {error}") from error
        except jinja2.TemplateError as error:
            raise TemplateFailed(f"is refused by {self.name}: {error}") from error

    def _unwritten(self, messages: Messages, tools: Any) -> str | None:
        """Return what the template never writes, as far as its source shows."""
        if tools and not _WRITES_TOOLS.search(self.source):
            return "tools"
        calls = any(message.get("tool_calls") for message in messages)
        return "tool calls" if calls and not _WRITES_TOOL_CALLS.search(self.source) else None

    def _marked_spans(self, messages: Messages, tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and where generated text stands in it."""
        marked, num_marked = self._rendered(messages, tools, False, marks=True)
        head, *parts = marked.split(_START)
        spans, position, plain = [], len(head), [head]
        for part in parts:
            trained, _, rest = part.partition(_STOP)
            spans.append((position, position + len(trained)))
            position += len(trained) + len(rest)
            plain += [trained, rest]
        text = "".join(plain)
        is_proved = self._compiled.writes_marks and marked.count(_STOP) == len(spans) == num_marked
        if not spans or (not is_proved and text != self._render(messages, tools, False)):
            raise TemplateFailed(f"has no text that {self.name} marks as generated")
        return text, spans

    def _spans_of_turns(
        self, messages: Messages, turns: Sequence[int], tools: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and where some assistant turns stand in it."""
        if turns and self.has_generation_marks:
            text, spans = self._marked_spans(messages, tools)
            return text, [span for turn in turns for span in self._marked_of(messages, turn, tools, text, spans)]
        text = self._render(messages, tools, False)
        return text, [self._span_of(messages, number, tools, text) for number in turns]

    def _marked_of(
        self, messages: Messages, number: int, tools: Any, text: str, spans: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Return the marked text of one turn."""
        before = self._prefix(messages[:number], tools, text, generation=False) if number else ""
        is_last = number + 1 == len(messages)
        until = text if is_last else self._prefix(messages[: number + 1], tools, text, generation=False)
        if before is not None and until is not None:
            inside = [span for span in spans if len(before) <= span[0] and span[1] <= len(until)]
            if inside:
                return inside
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(turns):
            raise TemplateFailed(f"turn {number + 1} cannot be found in what {self.name} writes")
        return [spans[turns.index(number)]]

    def _prefix(self, messages: Messages, tools: Any, text: str, *, generation: bool) -> str | None:
        """Return the rendering of the first messages where it is a beginning of ``text``."""
        if not messages and not generation:
            return None
        try:
            found = self._render(messages, tools, generation)
        except TemplateFailed:
            return None
        return found if text.startswith(found) else None

    def _span_of(self, messages: Messages, number: int, tools: Any, text: str) -> tuple[int, int]:
        before = self._prefix(messages[:number], tools, text, generation=True)
        is_last = number + 1 == len(messages)
        whole = text if is_last else self._prefix(messages[: number + 1], tools, text, generation=False)
        content = messages[number].get("content")
        if before is not None and whole is not None and len(before) < len(whole):
            without = self._prefix(messages[:number], tools, text, generation=False)
            writes_prompt = without is None or len(without) < len(before)
            if writes_prompt:
                return len(before), len(whole)
        if isinstance(content, str) and content:
            return self._span_around(messages, number, tools, text)
        raise TemplateFailed(f"turn {number + 1} cannot be found in what {self.name} writes")

    def _span_around(self, messages: Messages, number: int, tools: Any, text: str) -> tuple[int, int]:
        """Return the place of a turn's content and of the special token behind it."""
        changed = [dict(message) for message in messages]
        changed[number]["content"] = _SENTINEL
        head, found, tail = self._render(changed, tools, False).partition(_SENTINEL)
        stop = len(text) - len(tail)
        if not found or _SENTINEL in tail or not text.startswith(head) or not text.endswith(tail) or stop <= len(head):
            raise TemplateFailed(f"turn {number + 1} cannot be found in what {self.name} writes")
        ends = (token for token in self.special_tokens.values() if token and tail.startswith(token))
        return len(head), stop + max(map(len, ends), default=0)


@dataclass(frozen=True)
class _Compiled:
    render: Callable[..., tuple[str, int]]
    """Returns the text, and how many times generated text stands in it."""
    is_marked: bool
    writes_marks: bool
    """Whether generated text goes to the output as it is, so that marks change nothing else."""


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> _Compiled:
    """Return a compiled template, with the names and settings that Transformers gives templates."""
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    state = {"marks": False, "is_marked": False, "num_generated": 0}

    def refuse_private(names: Iterable[object]) -> None:
        private = next((name for name in names if str(name).startswith("_")), None)
        if private is not None:
            raise SecurityError(f"a namespace takes no attribute {private}")

    class Namespace(jinja2.utils.Namespace):
        """Refuses the attributes through which Python's internals are reached."""

        def __init__(self, *arguments: Any, **attributes: Any) -> None:
            values = dict(*arguments, **attributes)
            refuse_private(values)
            super().__init__(values)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_private((name,))
            super().__setitem__(name, value)

    class GenerationMarks(ext.Extension):
        tags = {"generation"}  # noqa: RUF012  (jinja2 reads it from the class)

        def parse(self, parser: Any) -> Any:
            state["is_marked"] = True
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

        def _generated(self, caller: Callable[[], str]) -> str:
            text = caller()
            state["num_generated"] += 1
            return f"{_START}{text}{_STOP}" if state["marks"] else text

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **more)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = Namespace
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    template = environment.from_string(source)

    def render(values: Mapping[str, Any], *, marks: bool) -> tuple[str, int]:
        state["marks"], state["num_generated"] = marks, 0
        return template.render(values), state["num_generated"]

    return _Compiled(render, bool(state["is_marked"]), _writes_calls(environment.parse(source)))


def _writes_calls(node: Any) -> bool:
    """Return whether generated text below a node goes straight to the output.

    A template can read the text of other blocks, such as ``{% set %}``, before it writes it.
    """
    from jinja2 import nodes

    writes = isinstance(node, nodes.Template | nodes.If | nodes.With | nodes.Scope) or (
        isinstance(node, nodes.For) and not node.recursive
    )
    for child in node.iter_child_nodes():
        if isinstance(child, nodes.CallBlock):
            if not writes or any(child.find_all(nodes.CallBlock)):
                return False
        elif any(child.find_all(nodes.CallBlock)) and not (writes and _writes_calls(child)):
            return False
    return True


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """Return copies without fields that are null, which many templates write as ``None``.

    Reasoning has several names: templates find it under ``reasoning_content`` and ``thinking``, as in Transformers.
    """
    found = []
    for message in messages:
        given = {key: value for key, value in message.items() if value is not None}
        reasoning = next((given[key] for key in ("reasoning_content", "thinking", "reasoning") if key in given), None)
        if reasoning is not None:
            given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
        found.append(given)
    return found


def _segments(text: str, spans: Sequence[tuple[int, int]], name: str) -> tuple[TextSegment, ...]:
    found, position = [], 0
    for start, stop in spans:
        if start < position:
            raise TemplateFailed(f"turns overlap in what {name} writes")
        found += [TextSegment(text[position:start], False), TextSegment(text[start:stop], True)]
        position = stop
    segments = joined([*found, TextSegment(text[position:], False)])
    if "".join(segment.text for segment in segments) != text:
        raise TemplateFailed(f"turns cannot be found in what {name} writes")
    return segments


def builtin_templates() -> tuple[str, ...]:
    """Return the names of the templates that the package carries."""
    folder = resources.files("launcher.config.data") / "templates"
    return tuple(sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".jinja")))


def builtin_template(name: str) -> str:
    """Return the text of a template that the package carries."""
    return (resources.files("launcher.config.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def stand_in_template() -> ChatTemplate:
    """Return a template that writes every conversation, for checks before the real one is here."""
    return ChatTemplate(_STAND_IN, "the chat template", image_token=IMAGE_MARK)


def find_template(choice: str, tokenizer: Path | None, *, option: str = "data.chat_template") -> ChatTemplate | None:
    """Return the chat template that an option names; ``None`` without one.

    Args:
        choice: ``auto``, ``none``, the name of a template of the tokenizer or of the package, or a file.
        tokenizer: folder of the tokenizer; ``None`` where it has none.
        option: the option, for messages.

    Raises:
        ConfigError: there is no such template, or it is no valid Jinja.
    """
    if choice == "none":
        return None
    own = {} if tokenizer is None else read_templates(tokenizer)
    special = {"eos_token": END} if tokenizer is None else special_tokens(tokenizer)
    if choice == "auto":
        source, name = own.get(DEFAULT_TEMPLATE), "the tokenizer's chat template"
        if source is None:
            return None
    elif choice in own:
        source, name = own[choice], f"the tokenizer's chat template {choice}"
    elif choice in builtin_templates():
        source, name = builtin_template(choice), f"the chat template {choice}"
    elif (file := Path(choice).expanduser()).is_file():
        source, name = _text_of_file(file, choice, option), f"the chat template {file}"
    else:
        names = sorted({*own, *builtin_templates()})
        fix = f"give a Jinja file, or a name: {did_you_mean(choice, names)}"
        raise ConfigError(option, choice, why="is neither a file nor a known template", fix=fix)
    facts = None if tokenizer is None else read_image_text(tokenizer)
    image_token = facts.token if facts is not None and facts.processor is not None else ""
    template = ChatTemplate(source, name, {"bos_token": "", **special}, image_token)
    if (problem := template.syntax_problem()) is not None:
        raise ConfigError(option, choice, why=f"is no valid Jinja: {problem}", fix="correct it")
    return template


def _text_of_file(file: Path, choice: str, option: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(option, choice, why=f"cannot be read: {error}", fix="correct it") from error


def read_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates in a tokenizer's folder by name, as Transformers finds them.

    A folder that cannot be read has none.
    """
    more = {file.stem: file for file in (folder / _NAMED_TEMPLATES).glob("*.jinja")}
    if (folder / _DEFAULT_FILE).is_file():
        more[DEFAULT_TEMPLATE] = folder / _DEFAULT_FILE
    if not more and has_processor(folder) and (own := _read_settings(folder / _OF_PROCESSOR).get("chat_template")):
        return {DEFAULT_TEMPLATE: str(own)}
    if more:  # with files of templates, Transformers does not look at those in the settings
        try:
            return {name: file.read_text(encoding="utf-8") for name, file in more.items()}
        except (OSError, UnicodeDecodeError):
            return {}
    given = _settings(folder).get("chat_template")
    if isinstance(given, str):
        return {DEFAULT_TEMPLATE: given}
    entries = given if isinstance(given, list) else []
    return {str(one["name"]): str(one["template"]) for one in entries if isinstance(one, dict) and "template" in one}


def write_default_template(folder: Path, source: str) -> None:
    """Make ``source`` the default chat template of a tokenizer's folder; keep its others."""
    others = {name: text for name, text in read_templates(folder).items() if name != DEFAULT_TEMPLATE}
    if others:
        (folder / _NAMED_TEMPLATES).mkdir(exist_ok=True)
    for name, text in others.items():
        write_atomic(folder / _NAMED_TEMPLATES / f"{name}.jinja", text)
    write_atomic(folder / _DEFAULT_FILE, source)


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens of a tokenizer's folder by name (``eos_token``)."""
    found = {}
    for name, value in _settings(folder).items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found |= _read_settings(folder / name)
    return found


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}
