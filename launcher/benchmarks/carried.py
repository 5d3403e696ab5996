"""Components on their way into a process of their own: as plain trees that name their class."""

from __future__ import annotations

import importlib
from typing import Any

from launcher.component import Component
from launcher.errors import ConfigError
from launcher.schema import build, to_tree


def packed(component: Component) -> dict[str, Any]:
    """Return what JSON can hold and ``unpacked`` turns into an equal component."""
    cls = type(component)
    values = {name: value for name, value in to_tree(component).items() if name != "kind"}
    return {"class": f"{cls.__module__}:{cls.__qualname__}", "values": values}


def unpacked(tree: dict[str, Any]) -> Any:
    """Return the component that ``packed`` was given."""
    module, _, name = tree["class"].partition(":")
    return build(getattr(importlib.import_module(module), name), tree["values"], path=name, report=_refuse)


def _refuse(error: ConfigError) -> None:
    raise error
