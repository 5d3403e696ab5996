"""The tree that Hydra composes from the shipped options, and those of plugins and users."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.config.folders import conf_folder, option_folders
from launcher.config.option_text import INTERPOLATION, quoted_text
from launcher.config.overrides import SEARCH_PATH, Override
from launcher.config.registry import KINDS
from launcher.errors import ConfigError
from launcher.utils.schema import ReportError

_UNUSED_DEFAULTS = ("~hydra/help", "~hydra/hydra_help", "~hydra/hydra_logging", "~hydra/job_logging")
"""Hydra's own files of help and logs.

Nothing here reads them, and they take a seventh of a composition's time.
"""


def compose_tree(overrides: Sequence[Override], config_dir: Path | None, report: ReportError) -> dict[str, Any] | None:
    """Run Hydra and return the unresolved tree; report errors and return ``None``."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    words = _choices(overrides, config_dir)
    try:
        tree = _composed(words, [override for override in overrides if _is_choice(override)])
        _set_values(tree, [override for override in overrides if not _is_choice(override)])
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        fix = "correct it there (`launch list` shows what exists)"
        report(ConfigError("the configuration", why="; ".join(lines[:4]), fix=fix))
        return None
    except RecursionError:
        why = "an experiment includes itself in its defaults, directly or through another one"
        report(ConfigError("the configuration", why=why, fix="remove it there"))
        return None
    except ValueError as error:  # Hydra's, of an experiment that says `override /compile: true`
        fix = 'put an option that YAML reads as a boolean in quotes (override /compile: "true")'
        report(ConfigError("the configuration", why=str(error), fix=fix))
        return None
    return tree


def _composed(words: tuple[str, ...], choices: Sequence[Override]) -> dict[str, Any]:
    """Return what Hydra composes of ``words``, which hold the choices, as a tree to change."""
    if not _is_shipped(words):
        return _tree(words)
    options = {override.key: override.word for override in choices}
    if len(options) == len(choices) and options.keys() <= KINDS.keys():
        return copy.deepcopy(_OPTIONS.tree(words, options))
    return copy.deepcopy(_shipped_tree(words))


class _ShippedOptions:
    """The shipped options of groups, each composed once.

    None has defaults or a package of its own, so what one sets depends on no other: a composition is made of parts
    where each is known. Experiments choose several options and set values anywhere: they have no part in this.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[str, str], Any] = {}
        self._names: tuple[str, ...] = ()

    def tree(self, words: Sequence[str], options: Mapping[str, str]) -> dict[str, Any]:
        """Return the tree of the options chosen, by group; ``words`` are Hydra's for the same."""
        keys = {name: (name, options.get(name, "")) for name in self._names}
        if not keys or not all(key in self._parts for key in keys.values()):
            tree = _tree(words)
            self._names = tuple(tree)
            self._parts |= {(name, options.get(name, "")): part for name, part in tree.items()}
            return tree
        return {name: self._parts[key] for name, key in keys.items()}


def _set_values(tree: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Set the values of the command line in a composed tree, as Hydra does after the files."""
    from omegaconf import OmegaConf

    names = {override.key.partition(".")[0] for override in overrides}
    part = {name: tree[name] for name in names if name in tree}
    config = OmegaConf.create(tree if has_variables(part) else part)  # a variable may lead to any option
    for override in overrides:
        OmegaConf.update(config, override.key, override.value, merge=True, force_add=True)
    values = OmegaConf.to_container(config)
    assert isinstance(values, dict)
    tree |= values


def has_variables(value: Any) -> bool:
    """Return whether a text in a tree holds ``${``."""
    if isinstance(value, dict | list):
        return any(map(has_variables, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and INTERPOLATION in value


def source_files(overrides: Sequence[Override], config_dir: Path | None) -> list[tuple[str, Path]]:
    """Return the (package, file) of every YAML that a composition used, later ones winning."""
    words = _choices(overrides, config_dir)
    entries = _shipped_entries(words) if _is_shipped(words) else _entries(words)
    folders = option_folders(config_dir)
    candidates = [(package, folder / f"{path}.yaml") for package, path in entries for folder in folders]
    return [(package, file) for package, file in candidates if file.is_file()]


def _is_choice(override: Override) -> bool:
    return override.is_group or override.key == SEARCH_PATH


def _choices(overrides: Sequence[Override], config_dir: Path | None) -> tuple[str, ...]:
    """Return the words that decide which files Hydra reads."""
    chosen = sorted(filter(_is_choice, overrides), key=lambda override: override.key)  # their order means nothing
    words = [*(override.word for override in chosen), *_UNUSED_DEFAULTS]
    folders = [quoted_text(f"file://{folder.resolve()}") for folder in option_folders(config_dir)[1:]]
    if folders:
        words.append(f"{SEARCH_PATH}=[{','.join(folders)}]")
    return tuple(words)


def _is_shipped(words: Sequence[str]) -> bool:
    """Whether Hydra reads the shipped options alone, which stay as they are."""
    return not any(word.startswith(SEARCH_PATH) for word in words)


@contextmanager
def _hydra() -> Iterator[None]:
    import hydra

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_folder()), job_name="launcher"):
        yield


def _tree(words: Sequence[str]) -> dict[str, Any]:
    import hydra
    from omegaconf import OmegaConf

    with _hydra():
        tree = OmegaConf.to_container(hydra.compose("config", list(words)))
    assert isinstance(tree, dict)
    return tree


def _entries(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the package and the path of each file that Hydra reads."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with _hydra():
        listed = GlobalHydra.instance().config_loader().compute_defaults_list("config", list(words), RunMode.RUN)
    return tuple((entry.package or "", str(entry.config_path)) for entry in listed.defaults)


# Composing takes a tenth of a second: the points of a sweep differ in values, rarely in the files that are read.
_OPTIONS = _ShippedOptions()
_shipped_tree = functools.lru_cache(maxsize=128)(_tree)
_shipped_entries = functools.lru_cache(maxsize=128)(_entries)
