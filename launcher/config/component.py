"""Component: base of every config group, a frozen dataclass that rejects bad values."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launcher.errors import ConfigError, ConfigErrors


@dataclass(frozen=True, kw_only=True)
class Component:
    """A configured part of a run: fields are config keys, ``kind`` names the class in YAML."""

    group: ClassVar[str]
    """The config group, and so the first word of the option a user types."""

    kind: ClassVar[str]
    """The value of the ``kind`` key that chooses this class."""

    summary_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that plans show even where they hold their default."""

    def __post_init__(self) -> None:
        errors = list(self.validate())
        other = next((item for item in errors if not issubclass(type(item), ConfigError)), None)
        if other is not None:
            why = f"{type(self).__name__}.validate() yields {type(other).__name__} instead of ConfigError"
            raise ConfigErrors([ConfigError(self.group, self.kind, why=why, fix=_YIELD)])
        if errors:
            raise ConfigErrors(errors)

    def validate(self) -> Iterator[ConfigError]:
        """Yield everything wrong with the values, each naming the option as the user typed it."""
        yield from ()

    def error(self, field: str, why: str, fix: str) -> ConfigError:
        """Return the error for one field of this component."""
        return ConfigError(f"{self.group}.{field}", getattr(self, field), why=why, fix=fix)

    def validate_minimum(self, minimum: float, *fields: str) -> Iterator[ConfigError]:
        """Yield an error for each of ``fields`` that is set and smaller than ``minimum``."""
        for field in fields:
            value = getattr(self, field)
            if isinstance(value, int | float) and value < minimum:
                yield self.error(field, f"must be at least {minimum:g}", f"set {self.group}.{field}={minimum:g}")


_YIELD = 'write yield self.error("FIELD", "WHY", "FIX") in it'
"""What the author of a plugin types."""


def class_title(cls: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def field_docs(cls: type, *, with_markup: bool = False) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and its bases, in one line each.

    Args:
        cls: the dataclass.
        with_markup: keep the backquotes around code.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs.update(_docs_of_file(inspect.getfile(base)).get(base.__name__, {}))
    texts = {field.name: docs.get(field.name, "") for field in dataclasses.fields(cls)}
    return texts if with_markup else {name: text.replace("``", "") for name, text in texts.items()}


@functools.cache
def _docs_of_file(file: str) -> dict[str, dict[str, str]]:
    module = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: dict(_field_docstrings(node)) for node in module.body if isinstance(node, ast.ClassDef)}


def _field_docstrings(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = following.value.value
            if isinstance(text, str):
                yield statement.target.id, " ".join(text.split())
