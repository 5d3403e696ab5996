"""Compose overrides to a typed Run by Hydra and the schema; report every error at once."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launcher.config.build import build_run, with_defaults
from launcher.config.folders import groups
from launcher.config.hydra_tree import compose_tree, has_variables, source_files
from launcher.config.option_text import INTERPOLATION, quoted_word
from launcher.config.overrides import (
    COMMAND_LINE,
    Override,
    parse_overrides,
    takes_only_text,
    takes_texts,
    types_of_option,
)
from launcher.config.plugins import take_plugins, used_plugins
from launcher.config.run import Run, run_to_tree
from launcher.config.user_files import unread_options, validate_user_files
from launcher.errors import ConfigError, ConfigErrors
from launcher.utils.schema import ReportError

if TYPE_CHECKING:
    from launcher.config.data.base import Corpus


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A composition that passed every check that needs no file system."""

    run: Run
    tree: dict[str, Any]
    """The resolved configuration as plain data; ``build_run`` gives ``run`` back."""
    sweep: dict[str, Any] | None
    """Value of ``+sweep=…``, untyped; ``None`` for a single run."""
    overrides: tuple[str, ...]
    """The words it was composed from."""
    is_resolved: bool = False
    """Whether names of runs were resolved already, as ``launcher.compose`` does."""


def compose(words: Sequence[str], *, config_dir: Path | None = None, sweeping: bool = False) -> Composition:
    """Compose and check a run.

    Args:
        words: Hydra overrides, and ``plugins=[…]``, which loads modules.
        config_dir: a folder of the user's own options, searched beside the shipped ones.
        sweeping: whether several values for one option are accepted; they are left out of the composition.

    Raises:
        ConfigErrors: everything that is wrong, each with the file and line it came from.
    """
    given, words = tuple(words), take_plugins(words)
    mistakes: list[ConfigError] = []
    known = groups(config_dir)
    overrides = parse_overrides(words, known, sweeping=sweeping, report=mistakes.append)
    if any(each.key == "tracker.report_to" for each in overrides) and all(each.key != "tracker" for each in overrides):
        overrides.append(Override(key="tracker", word="tracker=several", is_group=True))
    fixed = [override for override in overrides if override.choices is None]
    misled = {error.option for error in mistakes}  # a group whose option is unknown says nothing about its keys
    unusable = list(validate_user_files(fixed, config_dir, known))
    mistakes += unusable
    tree = None if unusable else compose_tree(fixed, config_dir, mistakes.append)
    run = None
    if tree is not None:
        sweep = tree.pop("sweep", None)
        if (below_exp := tree.pop("exp", None)) is not None:
            mistakes += unread_options(below_exp)
        if (given_plugins := tree.pop("plugins", None)) is not None:
            why = "belongs on the command line: options in files import no code"
            mistakes.append(ConfigError("plugins", given_plugins, why=why, fix="add plugins=[MODULE] to the command"))
        found: list[ConfigError] = []
        typed = {override.key: override.typed for override in fixed}
        resolved = _resolve(with_defaults(tree), found.append)
        _restore_text(resolved, lambda: source_files(fixed, config_dir))
        run = build_run(resolved, found.append, typed=typed)
        found = [_without_model_option(error, typed) for error in found]
        if any(error.option.partition(".")[0] == "model" for error in found):  # which gives the run its name
            found = [error for error in found if (error.option, error.value) != ("run.name", "${model.name}")]
        if run is not None:
            run = _with_tokenizer(run, typed, found.append)
        mistakes += [error for error in found if error.option.partition(".")[0] not in misled]
    if mistakes:
        sources = functools.cache(lambda: source_files(fixed, config_dir) if tree is not None else [])
        raise ConfigErrors([_with_origin(error, overrides, sources) for error in mistakes])
    assert run is not None, "no run and no reason"
    run = replace(run, plugins=used_plugins(run))
    return Composition(run=run, tree=run_to_tree(run), sweep=sweep, overrides=given)


def _without_model_option(error: ConfigError, typed: Mapping[str, object]) -> ConfigError:
    """Return ``error``; for a missing model with weights, advise to leave the model out."""
    if error.option != "model.name" or error.value is not None or "model.weights" not in typed:
        return error
    fix = f"{error.fix}, or leave model out if model.weights names a run, which has its own model"
    return ConfigError(error.option, why=error.why, fix=fix)


def _with_tokenizer(run: Run, typed: Mapping[str, object], report: ReportError) -> Run:
    """Return ``run`` with ``data.tokenizer=auto`` resolved, so the plan shows the tokenizer."""
    from launcher.config.data.base import Corpus

    if not isinstance(run.data, Corpus):
        return run
    data = run.data
    if data.tokenizer == "auto":
        data = replace(data, tokenizer="model" if run.model.has_own_tokenizer else "bpe")
    if not data.trains_tokenizer:
        if "data.vocab_size" in typed:
            report(unused_vocab_size(data))
        data = replace(data, vocab_size=Corpus.vocab_size)  # what the group's option says of a BPE would mislead
    return replace(run, data=data)


def unused_vocab_size(data: Corpus) -> ConfigError:
    """Return the error of ``data.vocab_size`` with a tokenizer that is not trained here."""
    why = f"data.tokenizer={data.tokenizer} has its own vocabulary"
    return ConfigError("data.vocab_size", data.vocab_size, why=why, fix="leave it out, or set data.tokenizer=bpe")


_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\}", re.ASCII)
"""A text that is the name of one option."""


def _resolve(tree: dict[str, Any], report: ReportError) -> dict[str, Any]:
    """Return ``tree`` with every ``${…}`` replaced, reporting the ones that lead nowhere."""
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

    def resolved(node: Any, path: str) -> Any:
        keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
        result: dict[Any, Any] = {}
        for key in keys:
            option = f"{path}.{key}".lstrip(".")
            try:
                value = "???" if OmegaConf.is_missing(node, key) else node[key]
            except InterpolationToMissingValueError:
                continue  # the option that it refers to is reported
            except OmegaConfBaseException as error:
                written = OmegaConf.to_container(node)[key]
                why = str(error).splitlines()[0]
                report(ConfigError(option, written, why=why, fix="name an option or a variable that exists"))
                continue
            result[key] = resolved(value, option) if isinstance(value, DictConfig | ListConfig) else value
        return list(result.values()) if isinstance(node, ListConfig) else result

    # OmegaConf takes as long as the rest of a composition, and most trees hold ${model.name}, the run's name, alone.
    replaced = {group: _without_plain_variables(values, tree) for group, values in tree.items()}
    if not any(map(has_variables, replaced.values())):
        return replaced
    answer: dict[str, Any] = resolved(OmegaConf.create(tree), "")
    return answer


def _without_plain_variables(values: Any, tree: Mapping[str, Any]) -> Any:
    """Return a group's options; ``${a.b}`` is replaced where ``a.b`` has a value of its own."""
    if not isinstance(values, dict):
        return values
    result = dict(values)
    for key, value in values.items():
        if isinstance(value, str) and (found := _VARIABLE.fullmatch(value)):
            target: Any = tree
            for name in found[1].split("."):
                target = target.get(name) if isinstance(target, dict) else None
            is_text = isinstance(target, str) and target != "???" and INTERPOLATION not in target
            result[key] = target if is_text or isinstance(target, int | float) else value
    return result


def _restore_text(tree: dict[str, Any], sources: Callable[[], Sequence[tuple[str, Path]]]) -> None:
    """Restore the YAML text of values that YAML parsed as numbers or booleans."""
    for option, parent, key in list(_misread(tree)):
        written = text_in_yaml(option, sources())
        if isinstance(parent[key], list):
            if isinstance(written, list) and len(written) == len(parent[key]):
                pairs = zip(parent[key], written, strict=True)
                parent[key] = [value if isinstance(value, str | None) else text for value, text in pairs]
        elif isinstance(written, str) and "${" not in written:
            parent[key] = written


def _misread(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield option, mapping and key of each number or boolean in place of text."""
    for group, values in tree.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            is_list = isinstance(value, list) and any(isinstance(each, int | float) for each in value)
            if not is_list and not isinstance(value, int | float):
                continue
            types_of = types_of_option(f"{group}.{name}", kind=values.get("kind"))
            if takes_texts(types_of) if is_list else takes_only_text(types_of):
                yield f"{group}.{name}", values, name


def _with_origin(
    error: ConfigError, overrides: Sequence[Override], sources: Callable[[], Sequence[tuple[str, Path]]]
) -> ConfigError:
    """Return ``error`` with what set its option.

    ``sources`` takes half as long as a composition: it is called only if no word of the command line set the option.
    """
    if error.source is not None:
        return error
    fix = error.fix
    source = find_origin(error.option, overrides, ()) or find_origin(error.option, (), sources())
    if source == COMMAND_LINE and isinstance(error.value, str) and "${" in error.value:
        is_element = error.option.rpartition(".")[2].isdigit()
        how = "write it in quotes, with \\${ for ${" if is_element else quoted_word(error.option, error.value)
        fix = f"{fix}; to pass this text literally: {how}"
    return ConfigError(error.option, error.value, why=error.why, fix=fix, source=source)


def find_origin(option: str, overrides: Sequence[Override], sources: Iterable[tuple[str, Path]]) -> str | None:
    """Return the source that set ``option`` last.

    Args:
        option: dotted, as in errors (``job.steps``; list positions are ignored).
        overrides: what the command line said.
        sources: (package, file) of every composed YAML, in the order in which later ones win.
    """
    keys = option.partition("[")[0].split(".")
    for override in overrides:
        if not override.is_group and override.key.split(".") == keys[: override.key.count(".") + 1]:
            return COMMAND_LINE
    found = None
    for package, file in sources:
        prefix = package.split(".") if package else []
        if keys[: len(prefix)] == prefix and (line := _line_of(file, keys[len(prefix) :])):
            found = f"{'/'.join(file.parts[-3:])}:{line}"
    return found


def text_in_yaml(option: str, sources: Iterable[tuple[str, Path]]) -> str | list[str] | None:
    """Return the YAML source text of the scalar, or a list's scalars, that set ``option`` last.

    YAML reads ``007`` as 7 and ``1e5`` as 100000.0; this is what the user wrote.

    Args:
        option: dotted.
        sources: as of ``find_origin``.
    """
    keys, found = option.split("."), None
    for package, file in sources:
        prefix = package.split(".") if package else []
        if keys[: len(prefix)] == prefix:
            found = _find(file, keys[len(prefix) :])[1] or found
    if isinstance(found, yaml.ScalarNode):
        return str(found.value)
    if isinstance(found, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in found.value):
        return [str(item.value) for item in found.value]
    return None


def _line_of(file: Path, keys: Sequence[str]) -> int | None:
    """Return the 1-based line on which ``keys`` is set in a YAML file, if it is."""
    return _find(file, keys)[0]


def _find(file: Path, keys: Sequence[str]) -> tuple[int | None, yaml.Node | None]:
    """Return the 1-based line on which ``keys`` is set in a YAML file and its value, if it is."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = None
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            return None, None
        for name, value in node.value:
            if name.value == key:
                node, line = value, name.start_mark.line + 1
                break
        else:
            return None, None
    return line, node
