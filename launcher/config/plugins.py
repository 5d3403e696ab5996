"""Plugins in the schema: check their dataclasses, register them, and name them in run.yaml."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from launcher.config.component import field_docs
from launcher.config.folders import conf_folder, options_in
from launcher.config.registry import KINDS
from launcher.config.run import Run
from launcher.errors import ConfigError, ConfigErrors, Unfit
from launcher.plugins.base import NAMED
from launcher.plugins.loading import (
    OPTION,
    LoadedPlugin,
    add_plugin,
    import_plugin,
    installed_modules,
    loaded_plugins,
)
from launcher.utils.schema import OPTION_TYPES, field_types, is_option_type
from launcher.utils.text import did_you_mean

BASES: dict[str, str] = {
    "job": "launcher.config.run:Job",
    "model": "launcher.config.model.base:Model",
    "data": "launcher.config.data.base:Corpus",
    "optimizer": "launcher.config.optimizer:Optimizer",
    "schedule": "launcher.config.schedule:Schedule",
    "benchmark": "launcher.config.run:Benchmark",
    "tracker": "launcher.config.tracker:Tracker",
    "backend": "launcher.config.backend.base:Backend",
}
"""What the dataclasses of a plugin derive from, by group."""

_WORD = re.compile(rf"\+{{0,2}}{OPTION}=(?P<value>.*)", re.DOTALL)


def take_plugins(words: Sequence[str]) -> list[str]:
    """Load installed plugins and those of ``plugins=[…]``; return the other words.

    Raises:
        ConfigErrors: every plugin that is unusable, with its file.
    """
    named, others = [], []
    for word in words:
        found = _WORD.fullmatch(word)
        if found is None:
            others.append(word)
        else:
            value = found["value"].strip()
            parts = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]  # a,b sweeps
            named += [part.strip().strip("'\"") for part in parts]
    load_plugins([module for module in named if module])
    return others


def load_plugins(modules: Iterable[str] = (), *, with_installed: bool = True) -> None:
    """Load the installed plugins and these modules, unless they are loaded.

    Args:
        modules: of plugins, by name.
        with_installed: whether to load those that an entry point names.

    Raises:
        ConfigErrors: every plugin that is unusable, with its file.
    """
    installed = installed_modules()
    errors: list[ConfigError] = []
    for module in dict.fromkeys((*(installed if with_installed else ()), *modules)):
        if module in {loaded.module for loaded in loaded_plugins()}:
            continue
        try:
            if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module, re.ASCII):
                raise ConfigError(OPTION, module, why="is not the name of a module", fix="write plugins=[my.module]")
            _register(import_plugin(module, is_installed=module in installed))
        except ConfigErrors as several:
            errors += several.errors
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise ConfigErrors(errors)


def load_plugins_of_run(tree: Mapping[str, Any], *, is_own_run: bool) -> tuple[str, ...]:
    """Return the plugins that a run.yaml names, loaded.

    A run.yaml may be another user's: importing what it names would run any module.

    Args:
        tree: the file's content.
        is_own_run: whether this process was started for this very run, and so may import what it names.

    Raises:
        ConfigError: it names a plugin that is neither installed nor named by the user.
        Unfit: this process belongs to the run, and its host cannot load a plugin.
    """
    named = tree.get("plugins", ())
    if not isinstance(named, list | tuple) or not all(isinstance(module, str) for module in named):
        raise ConfigError(OPTION, named, why="is not a list of modules", fix="write plugins=[my.module]")
    if is_own_run:
        try:
            load_plugins(named, with_installed=False)  # others of this host may be broken, and the run needs none
        except ConfigError as error:  # where the run was planned they could be loaded
            host, why = socket.gethostname(), f"which this run uses, cannot be loaded: {error.why}"
            raise Unfit(f"{host}: the plugin {error.value}, {why}; {_remedy_on_host(tree)}") from error
        return tuple(named)
    load_plugins()
    for module in named:
        if module not in {loaded.module for loaded in loaded_plugins()}:
            why = f"the run uses the plugin {module}, which is neither installed nor named here"
            raise ConfigError(OPTION, why=why, fix=f"install its package, or add {OPTION}=[{module}] to the command")
    return tuple(named)


def _remedy_on_host(tree: Mapping[str, Any]) -> str:
    """Return what to do about a host that lacks a plugin of the run."""
    backend = tree.get("backend")
    if isinstance(backend, Mapping) and backend.get("kind") == "kubernetes":
        return f"build the image {backend.get('image')} (backend.image) with its package"
    return "install its package there, as on the machine that started the run"


def used_plugins(run: Run) -> tuple[str, ...]:
    """Return the modules of the plugins of which ``run`` uses something."""
    kinds = [(component.group, component.kind) for component in run.components()]
    kinds += [(each.group, each.kind) for each in run.tracker.members]
    for group, field in NAMED.items():
        named = getattr(run.job, field, ())
        kinds += [(group, kind) for kind in (named if isinstance(named, tuple) else (named,))]
    return tuple(loaded.module for loaded in loaded_plugins() if any(loaded.adds(*each) for each in kinds))


def _register(loaded: LoadedPlugin) -> None:
    """Check the dataclasses and YAML of a plugin, and add them to the registry.

    Raises:
        ConfigErrors: everything that is wrong, each with its file.
    """
    errors = [*_taken(loaded), *_validate_yaml(loaded)]
    for group, kinds in loaded.plugin.options.items():
        for kind, target in kinds.items():
            errors += _validate_options(loaded, group, kind, target)
    if errors:
        raise ConfigErrors(errors)
    for group, kinds in loaded.plugin.options.items():
        KINDS[group].update(kinds)
    add_plugin(loaded)


def _error(loaded: LoadedPlugin, why: str, fix: str, *, file: Path | None = None) -> ConfigError:
    return ConfigError(OPTION, loaded.module, why=f"{file or loaded.file}: {why}", fix=fix)


def _taken(loaded: LoadedPlugin) -> Iterator[ConfigError]:
    for group, kinds in loaded.plugin.options.items():
        for kind in kinds:
            if kind in KINDS[group]:
                why = f"adds the {group} {kind}, which the launcher already has"
                yield _error(loaded, why, "give it another name")


def _validate_options(loaded: LoadedPlugin, group: str, kind: str, target: str) -> Iterator[ConfigError]:
    """Yield what is wrong with one dataclass."""
    module, _, name = target.partition(":")
    try:
        cls = _imported(loaded, target, f"{group} {kind}")
    except ConfigError as error:
        yield error
        return
    file = Path(importlib.import_module(module).__file__ or "")

    def wrong(why: str, fix: str) -> ConfigError:
        return _error(loaded, f"{name}{why}", fix, file=file)

    base_module, _, base_name = BASES[group].partition(":")
    base = getattr(importlib.import_module(base_module), base_name)
    if not (isinstance(cls, type) and issubclass(cls, base) and dataclasses.is_dataclass(cls)):
        derive = BASES[group].replace(":", ".")
        yield wrong(f" is not a dataclass that derives from {derive}", f"derive it from {derive}")
        return
    if "__dataclass_params__" not in vars(cls) or not vars(cls)["__dataclass_params__"].frozen:
        yield wrong(" is not a frozen dataclass", "decorate it: @dataclass(frozen=True, kw_only=True)")
        return
    if vars(cls).get("kind") != kind:
        why = f" has the kind {getattr(cls, 'kind', None)!r}, and the plugin names it {kind!r}"
        yield wrong(why, f'write kind: ClassVar[str] = "{kind}" in it')
    if not (cls.__doc__ or "").strip() or (cls.__doc__ or "").startswith(f"{name}("):
        yield wrong(" has no docstring", "write one line that says what it is")
    try:
        types = field_types(cast("Any", cls))
    except (NameError, TypeError, SyntaxError) as error:
        yield wrong(f" has types that cannot be read: {error}", "import what they name outside of TYPE_CHECKING")
        return
    for field, text in field_docs(cls).items():
        if field in types and not text:
            yield wrong(f".{field} has no docstring under it", "write one that says what it means")
        if field in types and not is_option_type(types[field]):
            shown = types[field].__name__ if isinstance(types[field], type) else types[field]
            yield wrong(f".{field} has the type {shown}, which no option supports", f"use {OPTION_TYPES}")
    for field in _untyped(file, name):
        yield wrong(
            f".{field} has no type, so it would not be an option", f"write {field}: TYPE = …, or ClassVar[TYPE]"
        )


def _imported(loaded: LoadedPlugin, target: str, what: str) -> Any:
    """Import ``module:name``.

    Raises:
        ConfigError: that fails.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module fails in any way
        why = f"{what} names {target}, and importing that fails: {type(error).__name__}: {error}"
        raise _error(loaded, why, f"correct {module}") from error


def _untyped(file: Path, name: str) -> Iterator[str]:
    """Yield the names that a class assigns without a type, which a dataclass passes over."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for statement in node.body:
                if isinstance(statement, ast.Assign):
                    yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def _validate_yaml(loaded: LoadedPlugin) -> Iterator[ConfigError]:
    """Yield what is wrong with files of options: their group, name, text or kind."""
    if loaded.conf is None:
        return
    shipped = options_in(conf_folder())
    for file in sorted(loaded.conf.glob("*/*.yaml")):
        group = file.parent.name
        if group not in (*KINDS, *shipped):
            yield _error(loaded, f"there is no group {group}", did_you_mean(group, (*KINDS, *shipped)), file=file)
        if file.stem in shipped.get(group, ()):
            yield _error(loaded, f"the launcher already has {group}/{file.stem}", "rename the file", file=file)
        for other in loaded_plugins():
            if other.conf is not None and (other.conf / group / file.name).is_file():
                yield _error(
                    loaded, f"the plugin {other.name} already has {group}/{file.stem}", "rename one", file=file
                )
        try:
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            yield _error(loaded, f"cannot be read as YAML: {str(error).splitlines()[0]}", "correct it", file=file)
            continue
        kind = tree.get("kind") if isinstance(tree, dict) else None
        known = {*KINDS.get(group, ()), *loaded.plugin.options.get(group, ())}
        if group in KINDS and kind not in known and not (isinstance(tree, dict) and "defaults" in tree):
            fix = f"begin it with kind: {next(iter(loaded.plugin.options.get(group, {})), 'KIND')}"
            yield _error(loaded, f"names no kind of the group {group}", fix, file=file)
