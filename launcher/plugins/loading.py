"""Import plugins, and look up what the loaded ones add."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError, ConfigErrors
from launcher.plugins.base import CALLBACK, CROSS_ENTROPY, EXECUTED, LOSS, METRIC, NAMED, OWN_METRICS, PLAIN, Plugin
from launcher.utils.text import did_you_mean

ENTRY_POINTS = "launcher.plugins"
"""Group of entry points by which an installed package names its plugin module."""

OPTION = "plugins"
"""Option that names modules of plugins."""

PLUGIN_PATH = "LAUNCHER_PLUGIN_PATH"
"""Variable of folders in which processes of a run find plugins that are not installed.

They are searched last: in PYTHONPATH they would precede the standard library, and a ``random.py`` beside a plugin would
replace it."""


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
        """Its name, and how a command loads it if no entry point does."""
        return f"plugin {self.name}" if self.is_installed else f"plugin {self.name}, {OPTION}=[{self.module}]"

    @cached_property
    def conf(self) -> Path | None:
        """The folder of its YAML."""
        return None if self.plugin.conf is None else self.file.parent / self.plugin.conf

    @property
    def folder(self) -> Path:
        """The folder in ``sys.path`` that holds it."""
        return self.file.parents[self.module.count(".") + (self.file.name == "__init__.py")]

    @property
    def package(self) -> Path:
        """The outermost regular package that holds it, else its folder or file.

        Other parts of a namespace package are not its own.
        """
        above = [folder for folder in self.file.parents if folder.is_relative_to(self.folder) and folder != self.folder]
        regular = [folder for folder in above if (folder / "__init__.py").is_file()]
        if regular:
            return regular[-1]
        return above[0] if above else self.file

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of its package, without bytecode and hidden files."""
        found = sorted(self.package.rglob("*")) if self.package.is_dir() else [self.package]
        inside = [path for path in found if path.is_file()]
        return tuple(path for path in inside if not _is_left_out(path.relative_to(self.folder)))

    @property
    def code_hash(self) -> str:
        """SHA-256 over the names and contents of its package's Python and YAML files."""
        digest = hashlib.sha256()
        for file in self.files:
            if file.suffix in (".py", ".yaml"):
                content = file.read_bytes()
                digest.update(f"{file.relative_to(self.folder).as_posix()}\0{len(content)}\0".encode())
                digest.update(content)
        return digest.hexdigest()

    @property
    def version(self) -> str:
        """Version of the package that was installed; empty without one."""
        if not self.is_installed:
            return ""
        from importlib.metadata import entry_points  # slow: see installed_modules

        named = (entry for entry in entry_points(group=ENTRY_POINTS) if _module_of(entry.value) == self.module)
        return next((entry.dist.version for entry in named if entry.dist is not None), "")

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

    A module that is not installed is looked for in the folders of ``PLUGIN_PATH`` and in the current folder, too.

    Raises:
        ConfigError: there is no such module, importing it fails, or it holds no usable ``Plugin``.
    """
    _search_plugin_path()
    if not is_installed:
        _search_current_folder(module)
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's module fails in any way; a script may exit
        raise _import_error(module, error, is_installed=is_installed) from error
    plugin, source = getattr(imported, "plugin", None), getattr(imported, "__file__", None)
    if source is None or not isinstance(plugin, Plugin):
        why = f"{source or 'it'} has no launcher.plugins.Plugin with the name plugin"
        raise ConfigError(OPTION, module, why=why, fix="add plugin = Plugin(name=…) to it (docs/extend.md)")
    found = LoadedPlugin(plugin=plugin, module=module, file=Path(source).absolute(), is_installed=is_installed)
    if errors := list(_validate(found)):
        raise ConfigErrors(errors)
    return found


def add_plugin(loaded: LoadedPlugin) -> None:
    """Register a checked plugin as loaded."""
    _loaded[loaded.module] = loaded


def installed_modules() -> tuple[str, ...]:
    """Return the modules of plugins that installed packages name."""
    if not any(_names_plugins(Path(folder)) for folder in sys.path):
        return ()
    from importlib.metadata import entry_points  # 30 ms with a hundred packages: only where one names a plugin

    return tuple(sorted({_module_of(entry.value) for entry in entry_points(group=ENTRY_POINTS)}))


def _module_of(entry: str) -> str:
    """Return the module in an entry point's value, ``module`` or ``module:plugin``."""
    return entry.partition(":")[0].strip()


def _names_plugins(folder: Path) -> bool:
    """Return whether the entry points of a package in a folder may name plugins."""
    try:
        with os.scandir(folder.absolute()) as entries:
            packages = [entry.path for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
    except NotADirectoryError:  # a zip file
        return True
    except OSError:  # it does not exist, or is closed to this user
        return False
    for package in packages:
        with suppress(OSError):  # most have no entry points; an .egg-info may be a file
            file = os.path.join(package, "entry_points.txt")  # noqa: PTH118 - of every package, at each composition
            status = os.stat(file)  # noqa: PTH116
            if _holds_group(file, status.st_mtime_ns, status.st_size):
                return True
    return False


@functools.lru_cache(maxsize=4096)
def _holds_group(file: str, _modified_ns: int, _size: int) -> bool:
    """Return whether a file of entry points may name plugins; a changed one is read again."""
    return ENTRY_POINTS.encode() in Path(file).read_bytes()


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
    """Yield an error for each kind that no loaded plugin has, or that is named twice.

    Args:
        option: that names them.
        group: one of ``NAMED``.
        kinds: named by the user.
        own: those of the launcher.
    """
    known, kinds = (*own, *plugin_kinds(group)), tuple(kinds)
    for kind in dict.fromkeys(kind for kind in kinds if kinds.count(kind) > 1):
        yield ConfigError(option, kind, why=f"the {group} is named {kinds.count(kind)} times", fix="name it once")
    for kind in kinds:
        if kind not in known:
            fix = f"{did_you_mean(kind, known)}, or " if known else ""
            fix = f"{fix}name the module that has it: plugins=[MODULE]"
            yield ConfigError(option, kind, why=f"no plugin that is loaded has a {group} of this name", fix=fix)


def origin_of(group: str, kind: str) -> str:
    """Return which plugin adds a kind; empty for the launcher's own."""
    return next((loaded.origin for loaded in loaded_plugins() if loaded.adds(group, kind)), "")


def declared_metrics(callback: str) -> tuple[str, ...]:
    """Return the metrics that a plugin declares for a callback; empty if it declares none."""
    found = (loaded.plugin.callback_metrics.get(callback) for loaded in loaded_plugins())
    return tuple(next(filter(None, found), ()))


def validate_callback_metrics(option: str, callbacks: Sequence[str]) -> Iterator[ConfigError]:
    """Yield an error for each callback that declares a metric which an earlier one declares."""
    first: dict[str, str] = {}
    for callback in dict.fromkeys(callbacks):
        for name in declared_metrics(callback):
            other = first.setdefault(name, callback)
            if other != callback:
                yield metric_clash(option, name, other, callback)


def metric_clash(option: str, metric: str, first: str, second: str) -> ConfigError:
    """Return the error for two callbacks that record one metric."""
    both = " and ".join(f"{callback} ({origin_of(CALLBACK, callback)})" for callback in (first, second))
    why = f"{both} both record the metric {metric}"
    return ConfigError(option, second, why=why, fix=f"leave one out of {option}, or rename the metric in one")


def conf_folders() -> tuple[Path, ...]:
    """Return the folders of YAML of all loaded plugins."""
    return tuple(loaded.conf for loaded in loaded_plugins() if loaded.conf is not None)


def plugins_of(modules: Iterable[str]) -> tuple[LoadedPlugin, ...]:
    """Return the loaded plugins of a run, which names their modules."""
    return tuple(_loaded[module] for module in modules)


def path_environment(modules: Iterable[str]) -> dict[str, str]:
    """Return the variable that lets other processes find plugins; empty if all are installed."""
    usual = {Path(path).resolve() for path in _site_folders()}
    folders = [loaded.folder for loaded in plugins_of(modules)]
    others = dict.fromkeys(str(folder) for folder in folders if folder.resolve() not in usual)
    return {PLUGIN_PATH: os.pathsep.join(others)} if others else {}


def _site_folders() -> Iterator[str]:
    """Yield this interpreter's folders of installed packages."""
    yield from (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages())
    if site.ENABLE_USER_SITE:
        yield site.getusersitepackages()


@contextmanager
def isolated_plugins() -> Iterator[None]:
    """Forget, at the end of this block, the plugins that were loaded in it. For tests."""
    before = dict(_loaded)
    try:
        yield
    finally:
        _loaded.clear()
        _loaded.update(before)


def _search_plugin_path() -> None:
    """Let imports search the folders of ``PLUGIN_PATH``, too, after all others."""
    folders = filter(None, os.environ.get(PLUGIN_PATH, "").split(os.pathsep))
    sys.path += [folder for folder in dict.fromkeys(folders) if folder not in sys.path]


def _search_current_folder(module: str) -> None:
    """Let imports search the current folder, too, if it holds a module.

    It comes after all others, so installed packages win. It stays in ``sys.path``: its modules are imported when
    they are used.
    """
    importlib.invalidate_caches()
    here, top = Path.cwd(), module.partition(".")[0]
    is_here = (here / top).is_dir() or (here / f"{top}.py").is_file()
    if is_here and str(here) not in sys.path:
        sys.path.append(str(here))


def _import_error(module: str, error: BaseException, *, is_installed: bool) -> ConfigError:
    top = module.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name is not None and f"{module}.".startswith(f"{error.name}."):
        why = f"there is no module {error.name} in this environment or in the current folder"
        return ConfigError(OPTION, module, why=why, fix="install its package, or name another module")
    where = _place_of(error, module)
    why = f"importing it fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} ({where})"
    fix = f"correct {where.partition(':')[0]}" + (f", or uninstall the package of {top}" if is_installed else "")
    return ConfigError(OPTION, module, why=why, fix=fix)


def _place_of(error: BaseException, module: str) -> str:
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
    """Yield what is wrong with its ``Plugin``, by itself and beside those that are loaded."""
    plugin = loaded.plugin

    def error(why: str, fix: str) -> ConfigError:
        return ConfigError(OPTION, loaded.module, why=f"{loaded.file}: {why}", fix=fix)

    known = {"options": (*EXECUTED, *PLAIN), "executors": (*EXECUTED, *NAMED)}
    if malformed := [field for field in known if not _maps_names(getattr(plugin, field))]:
        for field in malformed:
            yield error(f"{field} has values that are not text", 'write it as {"GROUP": {"KIND": "module:name"}}')
        return
    if not _maps_lists(plugin.callback_metrics):
        yield error("callback_metrics has values that are not lists of text", 'write it as {"CALLBACK": ("NAME",)}')
        return
    for name in plugin.callback_metrics.keys() - plugin.executors.get(CALLBACK, {}).keys():
        known_ones = did_you_mean(name, plugin.executors.get(CALLBACK, {})) or "add the callback to executors"
        yield error(f"callback_metrics names {name}, which is not a callback of this plugin", known_ones)
    for name in plugin.executors.get(METRIC, {}).keys() & set(OWN_METRICS):
        yield error(f"adds the metric {name}, which the launcher already has", "give it another name")
    if CROSS_ENTROPY in plugin.executors.get(LOSS, {}):
        yield error(f"adds the loss {CROSS_ENTROPY}, which the launcher already has", "give it another name")
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
            yield error(f"{group} {kind} is in only one of options and executors", f"add it to {lacking}")
    if loaded.conf is not None and not loaded.conf.is_dir():
        yield error(f"conf={plugin.conf} is not a folder beside the module", "add the folder to the package's data")
    for other in loaded_plugins():
        if other.name == loaded.name and other.file != loaded.file:
            yield error(f"has the name {loaded.name}, which {other.file} has already", "give it another name")


def _maps_names(value: object) -> bool:
    """Return whether ``value`` maps groups to kinds, and kinds to text."""
    return isinstance(value, Mapping) and all(
        isinstance(kinds, Mapping) and all(isinstance(text, str) for pair in kinds.items() for text in pair)
        for kinds in value.values()
    )


def _maps_lists(value: object) -> bool:
    """Return whether ``value`` maps text to lists or tuples of text."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(names, list | tuple) and all(isinstance(each, str) for each in names)
        for name, names in value.items()
    )


def _unresolvable(target: str) -> str:
    """Return why ``module:name`` names nothing; does not import it, since it may import torch."""
    module, _, name = target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # noqa: BLE001 (this imports the package above it, which fails in any way)
        return f"importing its package fails: {type(error).__name__}: {error}"
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return "" if spec is not None else "there is no such module"
    try:
        defined = set(_defined_names(ast.parse(Path(spec.origin).read_bytes())))
    except SyntaxError as error:
        return f"{spec.origin}:{error.lineno} is not Python: {error.msg}"
    return "" if defined & {name, "*", "__getattr__"} else f"{spec.origin} has no {name}"


def _defined_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module defines, also in branches; ``*`` for a star import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        else:
            yield from _defined_names(node)


def _is_left_out(path: Path) -> bool:
    return any(part == "__pycache__" or part.startswith(".") for part in path.parts)
