"""Build the typed run from a plain tree; suggest options for one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from launcher.config.adapter import QLORA_QUANTIZATION, Qlora
from launcher.config.component import Component
from launcher.config.model.base import Model
from launcher.config.paths import expand_home, expand_homes, homeless_paths
from launcher.config.registry import KINDS, component_class
from launcher.config.run import Run, RunOptions, default_run_name
from launcher.errors import ConfigError
from launcher.utils.schema import NO_SUCH_OPTION, ReportError, build, defaults, field_types
from launcher.utils.text import did_you_mean, shell_word

_ALIASES = {
    **dict.fromkeys(("learning_rate", "learningrate"), "optimizer.lr"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size", "micro_batch_size"), "job.micro_batch"),
    **dict.fromkeys(("max_steps", "num_steps", "iterations"), "job.steps"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "max_epochs"), "job.epochs"),
    **dict.fromkeys(("gpus", "num_gpus", "nproc_per_node", "world_size"), "backend.ranks"),
    **dict.fromkeys(("max_length", "max_seq_length", "seq_len", "block_size"), "job.sequence_length"),
    "dtype": "precision",
    "torch_dtype": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "strategy": "parallel",
    "gradient_checkpointing": "activation",
    "wandb": "tracker",
    "output_dir": "run.root",
}
"""Names of other programs for options and groups, in suggestions."""

_OPTION_OF_KIND = {
    ("model", "llama"): "llama_tiny",
    ("model", "smollm2"): "smollm2_135m",
    ("parallel", "zero"): "zero3",
    ("checkpoint", "policy"): "frequent",
}
"""An option of a group for each kind that has another name."""


def with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``tree`` with the defaults of every group's class filled in, unchecked."""
    full = dict(tree)
    for group, kinds in KINDS.items():
        given = tree.get(group)
        if isinstance(given, Mapping) and isinstance(given.get("kind"), str) and given["kind"] in kinds:
            full[group] = {**defaults(component_class(group, given["kind"])), **given}
    options = tree.get("run") or {}
    full["run"] = {**defaults(RunOptions), **options} if isinstance(options, Mapping) else options
    return full


def build_run(
    tree: Mapping[str, Any], report: ReportError, *, typed: Mapping[str, str] = MappingProxyType({})
) -> Run | None:
    """Return the typed run, or ``None`` after reporting every mistake in ``tree``.

    Args:
        tree: the composition, resolved.
        report: called once per mistake.
        typed: what the user typed behind each key, for messages.
    """
    parts: dict[str, Any] = {}
    for key in tree:
        if key not in (*KINDS, "run", "plugins"):
            report(ConfigError(key, why=NO_SUCH_OPTION, fix=suggest_option(key, tree, typed=typed)))
    backend = tree.get("backend")
    is_here = not (isinstance(backend, Mapping) and backend.get("kind") == "kubernetes")
    elsewhere = partial(_report_elsewhere, tree, typed, report)
    for group, kinds in KINDS.items():
        # a pod has another home
        parts[group] = _build_group(group, kinds, tree.get(group), elsewhere, expands_home=is_here)
    options = tree.get("run") or {}
    if isinstance(options, Mapping):
        parts["run"] = build(RunOptions, expand_homes(RunOptions, options), path="run", report=report)
    else:
        report(ConfigError("run", options, why="is not a set of options", fix="write run.name=<name>"))
        parts["run"] = None
    homeless = [
        error
        for group, part in parts.items()
        if part is not None
        for error in homeless_paths(group, part, is_here=is_here or group == "run")
    ]
    for error in homeless:
        report(error)
    if homeless or any(part is None for part in parts.values()):
        return None
    options, model = parts["run"], parts["model"]
    if not model.name.strip() and model.kind != "hf":  # of which it is a path
        report(ConfigError("model.name", repr(model.name), why="is empty", fix="leave it out, or name the model"))
        return None
    if expand_home(options.name) == expand_home(model.name):  # hub names stay as they are
        # the default; a path would put the run into the model's folder
        parts["run"] = replace(options, name=default_run_name(model.name))
    if parts["adapter"].kind == Qlora.kind and model.quantization == "none" and not _is_quantized(model):
        parts["model"] = replace(model, quantization=QLORA_QUANTIZATION)
    return Run(**parts, plugins=tuple(tree.get("plugins", ())))


def _is_quantized(model: Model) -> bool:
    """Return whether a model's weights are a folder of quantized ones."""
    try:
        return model.quantization_manifest() is not None
    except ConfigError:
        return True  # validate_quantization reports it


def suggest_option(key: str, tree: Mapping[str, Any], *, typed: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the phrase that ends an error about an option that does not exist.

    Args:
        key: a bare name (``lr``), or one below a group (``job.lr``).
        tree: the composition; options of its components come before those of others.
        typed: what the user typed behind each key; the phrase repeats it.
    """
    if (meant := _ALIASES.get(key.rpartition(".")[2].lower())) is not None:
        return f"did you mean {meant if meant in KINDS else _with_value(meant, key, typed)}?"
    found = options_named(key.rpartition(".")[2], tree)
    if key.replace("-", "").replace("_", "").lower() == "dryrun":
        return "did you mean dry_run=true?"
    groups = did_you_mean(key, [*KINDS, "run", "exp", "sweep"])
    if not found and not groups.startswith("did you mean"):
        names = {name for cls in _classes(_chosen(tree)) for name in field_types(cls)}
        close = difflib.get_close_matches(key.rpartition(".")[2], sorted(names), n=2, cutoff=0.75)
        found = [option for name in close for option in options_named(name, tree)]
    if not found:
        return groups
    return f"did you mean {' or '.join(_with_kind(option, key, tree, typed) for option in found)}?"


def _with_kind(option: str, key: str, tree: Mapping[str, Any], typed: Mapping[str, str]) -> str:
    """Return ``option=value``, with components that have the option if this one lacks it."""
    group, _, name = option.partition(".")
    word = _with_value(option, key, typed)
    if group == "run" or name in _fields({group: _chosen(tree).get(group, ())}):
        return word
    return f"{word} (with {' or '.join(_options_with(group, name))})"


def _options_with(group: str, name: str) -> list[str]:
    """Return the options that choose a component with the option ``name``: ``backend=ssh``."""
    kinds = [kind for kind in KINDS.get(group, ()) if name in _fields({group: (kind,)})]
    return [f"{group}={_OPTION_OF_KIND.get((group, kind), kind)}" for kind in kinds]


def _parts_with(group: str, name: str, tree: Mapping[str, Any]) -> list[str]:
    """Return the fields of the chosen component that are components with this option."""
    chosen = _chosen(tree).get(group, ())
    parts = {part: hint for cls in _classes({group: chosen}) for part, hint in field_types(cls).items()}
    return [
        part
        for part, hint in parts.items()
        if isinstance(hint, type) and is_dataclass(hint) and name in field_types(hint)
    ]


def _with_value(option: str, key: str, typed: Mapping[str, str]) -> str:
    """Return ``option=value``, with the value typed behind ``key``, quoted for a shell."""
    return shell_word(f"{option}={typed[key]}") if key in typed else option


def options_named(name: str, tree: Mapping[str, Any]) -> list[str]:
    """Return the options whose last part is ``name``, or ends in it.

    ``lr`` is ``optimizer.lr``; ``batch`` is ``job.micro_batch``.

    Those of the components in ``tree`` come first; the others are only named where there is none.
    """
    for kinds in (_chosen(tree), KINDS):
        for fits in (name.__eq__, lambda field: field.endswith(f"_{name}")):
            found = [
                f"{group}.{field}"
                for group, names in {**kinds, "run": ("run",)}.items()
                for field in dict.fromkeys(field for cls in _classes({group: names}) for field in field_types(cls))
                if fits(field)
            ]
            if found:
                return found
    return []


def _chosen(tree: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the kind of each component in ``tree``."""
    kinds = {group: tree[group].get("kind") for group in KINDS if isinstance(tree.get(group), Mapping)}
    return {group: (kind,) for group, kind in kinds.items() if kind in KINDS[group]}


def _classes(kinds: Mapping[str, Iterable[str]]) -> Iterator[type]:
    """Yield the classes of these kinds, by group."""
    for group, names in kinds.items():
        yield from [RunOptions] if group == "run" else (component_class(group, kind) for kind in names)


def _fields(kinds: Mapping[str, Iterable[str]]) -> set[str]:
    """Return the options of these kinds."""
    return {name for cls in _classes(kinds) for name in field_types(cls)}


def _report_elsewhere(
    tree: Mapping[str, Any], typed: Mapping[str, str], report: ReportError, error: ConfigError
) -> None:
    """Report a mistake; of an option that belongs to another group, name that group."""
    group, _, name = error.option.partition(".")
    if error.why == NO_SUCH_OPTION and name.lower() in _ALIASES:
        fix = suggest_option(error.option, tree, typed=typed)
        error = ConfigError(error.option, error.value, why=error.why, fix=fix, source=error.source)
    elif error.why == NO_SUCH_OPTION and "." not in name and not error.fix.startswith("did you mean"):
        if below := [f"{group}.{part}.{name}" for part in _parts_with(group, name, tree)]:
            fix = f"did you mean {' or '.join(_with_value(each, error.option, typed) for each in below)}?"
            report(ConfigError(error.option, error.value, why=error.why, fix=fix, source=error.source))
            return
        own = _options_with(group, name)  # of another kind of the group
        found = [] if own else [option for option in options_named(name, tree) if option.endswith(f".{name}")]
        words = [_with_kind(option, error.option, tree, typed) for option in found]
        fix = f"{' and '.join(own)} {'has' if len(own) == 1 else 'have'} it" if own else error.fix
        fix = f"did you mean {' or '.join(words)}?" if found else fix
        error = ConfigError(error.option, error.value, why=error.why, fix=fix, source=error.source)
    report(error)


def _build_group(
    group: str, kinds: Mapping[str, str], given: Any, report: ReportError, *, expands_home: bool
) -> Component | None:
    if not isinstance(given, Mapping):
        report(ConfigError(group, given, why="is not a set of options", fix=f"choose one: {group}=<option>"))
        return None
    values = dict(given)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        report(ConfigError(f"{group}.kind", kind, why="is not known", fix=did_you_mean(str(kind), kinds)))
        return None
    cls = component_class(group, kind)
    return build(cls, expand_homes(cls, values) if expands_home else values, path=group, report=report)
