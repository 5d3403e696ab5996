"""Chats before they are text: which messages there may be, and which of a tokenizer's templates writes them down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DEFAULT = "default"
"""The template that is used where none is named, as Transformers has it."""

_NO_CONTENT = "is null, which only an assistant's may be"
_CONTENT = 'takes text, or a list of parts {"type": "text", "text": "…"}'


class BadMessages(Exception):
    """A list of messages that is none.

    Attributes:
        field: which place in it is wrong, as ``messages.1.content``.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.field = field


class NoTemplate(Exception):
    """The tokenizer has no such chat template; the message says what it has."""


def plain_messages(messages: Any, *, field: str = "messages") -> list[dict[str, str]]:
    """Return messages as templates take them: a role and one text each.

    Args:
        messages: as JSON gives them.
        field: where they stand, for the error.

    Raises:
        BadMessages: they are none, and why.
    """
    if not isinstance(messages, list) or not messages:
        raise BadMessages(field, "takes a list of objects with role and content, at least one")
    return [_plain(message, f"{field}.{number}") for number, message in enumerate(messages)]


def _plain(message: Any, field: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise BadMessages(field, "takes an object with role and content")
    for name in message:
        if name not in ("role", "content"):
            raise BadMessages(f"{field}.{name}", "no such field")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not role:
        raise BadMessages(f"{field}.role", "takes text")
    if content is None and role != "assistant":
        raise BadMessages(f"{field}.content", _NO_CONTENT)
    if isinstance(content, list):
        for number, part in enumerate(content):
            is_text = isinstance(part, Mapping) and part.keys() == {"type", "text"} and part["type"] == "text"
            if not is_text or not isinstance(part["text"], str):
                raise BadMessages(f"{field}.content.{number}", 'takes {"type": "text", "text": "…"}')
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise BadMessages(f"{field}.content", _CONTENT)
    # OpenAI's newer word for system; an assistant that said nothing
    return {"role": "system" if role == "developer" else role, "content": content or ""}


def chosen_template(templates: Mapping[str, str], name: str | None) -> str:
    """Return the template of a name, the default one where no name is given.

    Raises:
        NoTemplate: there is none.
    """
    if not templates:
        raise NoTemplate("this tokenizer has no chat template")
    wanted = name or DEFAULT
    if wanted not in templates:
        raise NoTemplate(f"this tokenizer has no chat template {wanted[:100]!r}; it has {', '.join(sorted(templates))}")
    return templates[wanted]


def templates_of(loaded: str | Mapping[str, str] | None) -> dict[str, str]:
    """Return the templates of a Transformers tokenizer by name; a single one is the default."""
    if isinstance(loaded, str):
        return {DEFAULT: loaded}
    return dict(loaded or {})


def template_names(folder: Path) -> Sequence[str]:
    """Return the names of the templates in a tokenizer's folder, without loading it; what cannot be read has none."""
    found = {path.stem for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        found.add(DEFAULT)
    if found:  # with files of templates, Transformers does not look at those in the settings
        return sorted(found)
    try:
        given = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        given = None
    if isinstance(given, str):
        found.add(DEFAULT)
    elif isinstance(given, list):
        found |= {str(entry["name"]) for entry in given if isinstance(entry, dict) and "name" in entry}
    return sorted(found)
