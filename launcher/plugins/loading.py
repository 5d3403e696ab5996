"""Import plugins, and look up what the loaded ones add."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError, EnvironmentProblem
from launcher.plugins.base import CALLBACK, EXECUTED, LOSS, PLAIN, Plugin
from launcher.utils.text import did_you_mean

ENTRY_POINTS = "launcher.plugins"
"""Group of entry points by which an installed package names its plugin module."""

OPTION = "plugins"
"""Option that names modules of plugins."""


@dataclass(frozen=True, kw_only=True)
class LoadedPlugin:
    """A plugin whose module was imported."""

    plugin: Plugin
    module: str
    file: Path
    """Of the module."""
    is_installed: bool
    """Whether an entry point names it."""

    @property
    def name(self) -> str:
        """Its own name."""
        return self.plugin.name

    @property
    def origin(self) -> str:
        """How users came by it."""
        return f"plugin {self.name}" if self.is_installed else f"plugin {self.name}, {OPTION}=[{self.module}]"

    @cached_property
    def conf(self) -> Path | None:
        """The folder of its YAML."""
        return None if self.plugin.conf is None else self.file.parent / self.plugin.conf

    @property
    def package(self) -> Path:
        """The top-level package that holds the module, or its file."""
        top = self.file
        for _ in range(self.module.count(".") + (self.file.name == "__init__.py")):
            top = top.parent
        return top

    def adds(self, group: str, kind: str) -> bool:
        """Return whether it adds a kind."""
        return any(kind in kinds.get(group, {}) for kinds in (self.plugin.options, self.plugin.executors))


_loaded: dict[str, LoadedPlugin] = {}
"""By module. A registry: what is in it was imported, and stays so until this process ends."""


def loaded_plugins() -> tuple[LoadedPlugin, ...]:
    """Return the loaded plugins, in the order in which they were loaded."""
    return tuple(_loaded.values())


def import_plugin(module: str, *, is_installed: bool = False) -> LoadedPlugin:
    """Import a plugin's module and return its checked ``Plugin``; not loaded yet.

    A module that is not installed is looked for in the current folder, too.

    Raises:
        ConfigError: there is no such module, importing it fails, or it holds no usable ``Plugin``.
    """
    if not is_installed:
        _search_current_folder()
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a user's module fails in any way
        raise _import_error(module, error, is_installed=is_installed) from error
    plugin = getattr(imported, "plugin", None)
    file = Path(imported.__file__ or "").resolve()
    if not isinstance(plugin, Plugin):
        why = f"{file} holds no launcher.plugins.Plugin under the name plugin"
        raise ConfigError(OPTION, module, why=why, fix="add plugin = Plugin(name=…) to it (docs/extend.md)")
    found = LoadedPlugin(plugin=plugin, module=module, file=file, is_installed=is_installed)
    for problem in _validate(found):
        raise problem
    return found


def add_plugin(loaded: LoadedPlugin) -> None:
    """Count a plugin among the loaded ones."""
    _loaded[loaded.module] = loaded


def installed_modules() -> tuple[str, ...]:
    """Return the modules of plugins that installed packages name."""
    if not any(_names_plugins(Path(folder)) for folder in sys.path):
        return ()
    from importlib.metadata import entry_points  # 30 ms with a hundred packages: only where one names a plugin

    return tuple(sorted(entry.value for entry in entry_points(group=ENTRY_POINTS)))


def _names_plugins(folder: Path) -> bool:
    """Return whether the entry points of a package in a folder may name plugins."""
    group = ENTRY_POINTS.encode()
    try:
        with os.scandir(folder) as entries:
            packages = [entry.path for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
    except NotADirectoryError:  # a zip file
        return True
    except OSError:  # it does not exist, or is closed to this user
        return False
    for package in packages:
        with suppress(OSError):  # most have no entry points; an .egg-info may be a file
            if group in Path(package, "entry_points.txt").read_bytes():
                return True
    return False


def executor(group: str, kind: str, registry: Mapping[str, str]) -> Any:
    """Import and return what executes a kind: from the program's own registry, or from a plugin."""
    target = registry.get(kind) or next(
        loaded.plugin.executors[group][kind]
        for loaded in loaded_plugins()
        if kind in loaded.plugin.executors.get(group, {})
    )
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def plugin_kinds(group: str) -> tuple[str, ...]:
    """Return the kinds of a group that plugins execute."""
    return tuple(kind for loaded in loaded_plugins() for kind in loaded.plugin.executors.get(group, {}))


def validate_named(option: str, group: str, kinds: Iterable[str], *, own: Sequence[str] = ()) -> Iterator[ConfigError]:
    """Yield an error for each of ``kinds`` (callbacks, losses) that no loaded plugin has.

    Args:
        option: that names them.
        group: ``callback`` or ``loss``.
        kinds: named by the user.
        own: those of the launcher.
    """
    known = (*own, *plugin_kinds(group))
    for kind in kinds:
        if kind not in known:
            fix = f"{did_you_mean(kind, known)}, or " if known else ""
            fix = f"{fix}name the module that has it: plugins=[MODULE]"
            yield ConfigError(option, kind, why=f"no plugin that is loaded has a {group} of this name", fix=fix)


def origin_of(group: str, kind: str) -> str:
    """Return which plugin adds a kind; empty for the launcher's own."""
    return next((loaded.origin for loaded in loaded_plugins() if loaded.adds(group, kind)), "")


def conf_folders() -> tuple[Path, ...]:
    """Return the folders of YAML of all loaded plugins."""
    return tuple(loaded.conf for loaded in loaded_plugins() if loaded.conf is not None)


def import_folders() -> tuple[str, ...]:
    """Return the folders that other processes need to import the loaded plugins."""
    usual = {Path(path).resolve() for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))}
    folders = [loaded.package.parent for loaded in loaded_plugins()]
    return tuple(dict.fromkeys(str(folder) for folder in folders if folder not in usual))


def packages() -> tuple[Path, ...]:
    """Return the top-level package, or the file, of each loaded plugin."""
    return tuple(dict.fromkeys(loaded.package for loaded in loaded_plugins()))


@contextmanager
def isolated_plugins() -> Iterator[None]:
    """Forget, at the end of this block, the plugins that were loaded in it. For tests."""
    before = dict(_loaded)
    try:
        yield
    finally:
        _loaded.clear()
        _loaded.update(before)


def _search_current_folder() -> None:
    """Let imports find modules of the current folder, after all others: installed packages win.

    It stays in ``sys.path``: modules of a plugin are imported when they are used.
    """
    here = os.getcwd()  # noqa: PTH109
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()


def _import_error(module: str, error: Exception, *, is_installed: bool) -> ConfigError:
    top = module.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name is not None and f"{module}.".startswith(f"{error.name}."):
        why = f"there is no module {error.name} in this environment or in the current folder"
        return ConfigError(OPTION, module, why=why, fix="install its package, or name another module")
    where = _place_of(error, module)
    why = f"importing it fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} ({where})"
    fix = f"correct {where.partition(':')[0]}" + (f", or uninstall the package of {top}" if is_installed else "")
    return ConfigError(OPTION, module, why=why, fix=fix)


def _place_of(error: Exception, module: str) -> str:
    """Return file and line of the plugin in which an import failed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    places, trace = [], error.__traceback__
    while trace is not None:
        places.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    own = [place for place in places if f"{os.sep}{module.partition('.')[0]}" in place[0]]
    file, line = (own or places)[-1]
    return f"{file}:{line}"


def _validate(loaded: LoadedPlugin) -> Iterator[ConfigError]:
    """Yield what its ``Plugin`` says wrongly, by itself and beside those that are loaded."""
    plugin = loaded.plugin

    def error(why: str, fix: str) -> ConfigError:
        return ConfigError(OPTION, loaded.module, why=f"{loaded.file}: {why}", fix=fix)

    known = {"options": (*EXECUTED, *PLAIN), "executors": (*EXECUTED, CALLBACK, LOSS)}
    for field, groups in known.items():
        for group, kinds in getattr(plugin, field).items():
            if group not in groups:
                yield error(f"{field} has the group {group}, which plugins cannot add to", did_you_mean(group, groups))
            for kind, target in kinds.items():
                if not target.partition(":")[2]:
                    why = f"{field} has {target!r} for {group} {kind}"
                    yield error(why, "write it as module:name")
                for other in loaded_plugins():
                    if kind in getattr(other.plugin, field).get(group, {}):
                        why = f"adds the {group} {kind}, which the plugin {other.name} ({other.file}) has already"
                        yield error(why, "give it another name, or load one of the two")
    for group, kinds in plugin.executors.items():
        for kind, target in kinds.items():
            if why := _unresolvable(target):
                yield error(f"executors: {group} {kind} names {target}, and {why}", "correct it, or add it")
    for group in EXECUTED:
        needed = set(plugin.options.get(group, {}))
        for kind in sorted(needed ^ set(plugin.executors.get(group, {}))):
            lacking = "executors" if kind in needed else "options"
            yield error(f"{group} {kind} stands in only one of options and executors", f"add it to {lacking}")
    if loaded.conf is not None and not loaded.conf.is_dir():
        yield error(f"conf={plugin.conf} is no folder beside it", "add the folder to the package's data")
    for other in loaded_plugins():
        if other.name == loaded.name and other.file != loaded.file:
            yield error(f"has the name {loaded.name}, which {other.file} has already", "give it another name")


def _unresolvable(target: str) -> str:
    """Return why ``module:name`` names nothing; does not import it, since it may import torch."""
    module, _, name = target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return "" if spec is not None else "there is no such module"
    try:
        body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    except SyntaxError as error:
        return f"{spec.origin}:{error.lineno} is not Python: {error.msg}"
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    targets = [one for node in body if isinstance(node, ast.Assign) for one in node.targets]
    defined |= {one.id for one in targets if isinstance(one, ast.Name)}
    return "" if name in defined else f"{spec.origin} has no {name}"


def missing_on_host(module: str) -> EnvironmentProblem:
    """Return the error of a rank whose host lacks a plugin of the run."""
    return EnvironmentProblem(
        f"the plugin {module}, which this run uses, cannot be imported on this host: install its package here, or set "
        "backend.code=sent"
    )
