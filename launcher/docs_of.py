"""The docstring under a dataclass field, which Python itself throws away: read from the source when asked for."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path


def title_of(cls: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def field_docs(cls: type) -> dict[str, str]:
    """Return what is written under each field of a dataclass, those of its bases included, in one line each."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs.update(_documented(inspect.getfile(base)).get(base.__name__, {}))
    return {field.name: docs.get(field.name, "") for field in dataclasses.fields(cls)}


@functools.cache
def _documented(file: str) -> dict[str, dict[str, str]]:
    module = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: dict(_in_class(node)) for node in module.body if isinstance(node, ast.ClassDef)}


def _in_class(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = following.value.value
            if isinstance(text, str):
                yield statement.target.id, " ".join(text.split()).replace("``", "")
