"""Compose, plan, launch and supervise language-model jobs.

    run = launcher.compose(["model=gpt2", "job.steps=20"])
    print(launcher.render(launcher.plan(run)))
    result = launcher.run(run)

Importing this package imports nothing else: the functions are loaded when they are used.
"""

from typing import Any

__version__ = "0.1.0"

_API = {
    "ConfigError": ("launcher.errors", "ConfigError"),
    "ConfigErrors": ("launcher.errors", "ConfigErrors"),
    "LauncherError": ("launcher.errors", "LauncherError"),
    "Plan": ("launcher.protocol.plan", "Plan"),
    "Result": ("launcher.api.result", "Result"),
    "RunHandle": ("launcher.api.handle", "RunHandle"),
    "Run": ("launcher.config.run", "Run"),
    "Sweep": ("launcher.api.sweep", "Sweep"),
    "compose": ("launcher.api.functions", "compose"),
    "load": ("launcher.api.functions", "load"),
    "plan": ("launcher.api.functions", "plan"),
    "render": ("launcher.api.functions", "render"),
    "run": ("launcher.api.functions", "run"),
    "sweep": ("launcher.api.functions", "sweep"),
}
"""Module and name of each part of the Python API."""


def __getattr__(name: str) -> Any:
    """Load a part of the Python API."""
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _API[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """Return the names of the Python API."""
    return sorted([*globals(), *_API])
