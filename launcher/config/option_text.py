"""Values, components and overrides as the text that a user types."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.config.component import Component
from launcher.utils.schema import defaults, to_tree
from launcher.utils.text import shell_word

INTERPOLATION = "${"
"""Start of a variable in Hydra's grammar."""
_PLAIN = re.compile(r"[A-Za-z./][\w/.+*?@|-]*", re.ASCII)
"""Text that means itself in Hydra's grammar, and in a list there."""


def component_text(component: Component) -> str:
    """Return a component's kind, summary fields and non-default values.

    For instance ``cosine warmup_steps=10``.
    """
    usual = defaults(type(component))
    words = [component.kind]
    for field in dataclasses.fields(component):
        value = to_tree(getattr(component, field.name))
        if field.name in component.summary_fields or field.name not in usual or usual[field.name] != value:
            words.append(f"{field.name}={value_text(value)}")
    return " ".join(words)


def value_text(value: object) -> str:
    """Return a plain value as one types it in an override."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:_}"
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {value_text(item)}' for key, item in value.items())}}}"
    text = str(value)
    return text if text.isprintable() else json.dumps(text, ensure_ascii=False)  # a line end stays in its line


def flatten_options(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (``a.b``, value as one types it) of every leaf of a tree."""
    for key, value in tree.items():
        option = f"{path}.{key}".lstrip(".")
        if isinstance(value, Mapping) and value:
            yield from flatten_options(value, option)
        else:
            yield option, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def quoted_word(key: str, value: str | Sequence[str]) -> str:
    """Return the word that sets ``key`` to exactly this text or list, quoted for a shell."""
    texts = [value] if isinstance(value, str) else value
    plain = all(_PLAIN.fullmatch(text) and text.lower() not in ("true", "false", "null") for text in texts)
    quoted = [text if plain else quoted_text(text, escape=True) for text in texts]
    word = f"{key}={quoted[0]}" if isinstance(value, str) else f"{key}=[{','.join(quoted)}]"
    as_it_stands = plain or any(re.search(r"""['"$`\\!]""", text) or not text.isprintable() for text in texts)
    return shell_word(word) if as_it_stands else f'"{word}"'


def quoted_text(text: str, *, escape: bool = False) -> str:
    """Return ``text`` in Hydra's quotes; interpolations (``${``) stay unless ``escape``."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if INTERPOLATION in text and (escape or not interpolates(text)):
        text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)
    return str(QuotedString(text=text, quote=Quote.single).with_quotes())


def interpolates(text: str) -> bool:
    """Return whether Hydra takes ``text`` for one with variables in it."""
    from omegaconf.errors import GrammarParseError
    from omegaconf.grammar_parser import parse

    with contextlib.suppress(GrammarParseError):
        parse(text)
        return True
    return False
