"""Run: the typed configuration of all groups, built from a plain tree."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launcher.config.activation import ActivationCheckpointing
from launcher.config.attention import Attention
from launcher.config.backend.base import Backend
from launcher.config.benchmark.base import Benchmark, NoBenchmark
from launcher.config.checkpoint import Checkpoint
from launcher.config.compile import Compile
from launcher.config.component import Component
from launcher.config.data.base import Data
from launcher.config.job.base import BatchedJob, Job
from launcher.config.model.base import Model
from launcher.config.optimizer import AdamW
from launcher.config.parallel.base import Parallel
from launcher.config.paths import PathText, expand_homes, named_paths
from launcher.config.precision import Precision
from launcher.config.profile import Profile
from launcher.config.quantization import NoQuantization, Quantization
from launcher.config.registry import KINDS, component_class
from launcher.config.schedule import Schedule
from launcher.config.tracker import Tracker
from launcher.errors import ConfigError
from launcher.utils.schema import NO_SUCH_OPTION, ReportError, build, defaults, field_types, to_tree
from launcher.utils.text import did_you_mean


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run is kept."""

    root: PathText = "runs"
    """Folder of all runs."""

    name: str = "run"
    """What kind of run this is: the folder below ``root``, and the W&B group. The model's name by default, of a path or
    a hub name its last part; never a path."""

    dir: PathText | None = None
    """The run directory itself, instead of ``<root>/<name>/<time>-<letters>``."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run, typed and resolved."""

    job: Job
    model: Model
    data: Data
    parallel: Parallel
    optimizer: AdamW
    schedule: Schedule
    precision: Precision
    quantization: Quantization | NoQuantization
    activation: ActivationCheckpointing
    attention: Attention
    compile: Compile
    checkpoint: Checkpoint
    benchmark: Benchmark | NoBenchmark
    profile: Profile
    tracker: Tracker
    backend: Backend
    run: RunOptions

    @property
    def batched_job(self) -> BatchedJob:
        """The job as engines know it: one that works through batches."""
        assert isinstance(self.job, BatchedJob), f"job={self.job.kind} has no batches, and asks for no engine"
        return self.job

    def components(self) -> Iterator[Component]:
        """Yield the component of each group."""
        for group in KINDS:
            yield getattr(self, group)

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield option and value of every path that this run names."""
        for group in (*KINDS, "run"):
            yield from named_paths(group, getattr(self, group))


def with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``tree`` with the defaults of every group's class filled in, unchecked."""
    full = dict(tree)
    for group, kinds in KINDS.items():
        given = tree.get(group)
        if isinstance(given, Mapping) and given.get("kind") in kinds:
            full[group] = {**defaults(component_class(group, given["kind"])), **given}
    full["run"] = {**defaults(RunOptions), **(tree.get("run") or {})}
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
        if key not in KINDS and key != "run":
            report(ConfigError(key, why=NO_SUCH_OPTION, fix=suggest_option(key, tree, typed=typed)))
    backend = tree.get("backend")
    is_here = not (isinstance(backend, Mapping) and backend.get("kind") == "kubernetes")
    elsewhere = partial(_report_elsewhere, tree, typed, report)
    for group, kinds in KINDS.items():
        # a pod has another home
        parts[group] = _build_group(group, kinds, tree.get(group), elsewhere, expands_home=is_here)
    parts["run"] = build(RunOptions, expand_homes(RunOptions, tree.get("run") or {}), path="run", report=report)
    if any(part is None for part in parts.values()):
        return None
    options, model = parts["run"], parts["model"]
    if os.path.expanduser(options.name) == os.path.expanduser(model.name):  # noqa: PTH111 (hub names are no paths)
        # the default; a path would put the run into the model's folder
        parts["run"] = replace(options, name=default_run_name(model.name))
    return Run(**parts)


def suggest_option(key: str, tree: Mapping[str, Any], *, typed: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the phrase that ends an error about an option that does not exist.

    Args:
        key: a bare name (``lr``), or one below a group (``job.lr``).
        tree: the composition; options of its components come before those of others.
        typed: what the user typed behind each key; the phrase repeats it.
    """
    found = options_named(key.rpartition(".")[2], tree)
    groups = did_you_mean(key, [*KINDS, "run", "exp", "sweep"])
    if not found and not groups.startswith("did you mean"):
        names = {name for cls in _classes(_chosen(tree)) for name in field_types(cls)}
        close = difflib.get_close_matches(key.rpartition(".")[2], sorted(names), n=2, cutoff=0.75)
        found = [option for name in close for option in options_named(name, tree)]
    if not found:
        return groups
    value = f"={typed[key]}" if key in typed else ""
    return f"did you mean {' or '.join(f'{option}{value}' for option in found)}?"


def options_named(name: str, tree: Mapping[str, Any]) -> list[str]:
    """Return the options whose last part is ``name`` (``optimizer.lr``) or ends so (``batch``: ``job.micro_batch``).

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


def _report_elsewhere(
    tree: Mapping[str, Any], typed: Mapping[str, str], report: ReportError, error: ConfigError
) -> None:
    """Report a mistake; of an option that belongs to another group, name that group."""
    group, _, name = error.option.partition(".")
    if error.why == NO_SUCH_OPTION and "." not in name and not error.fix.startswith("did you mean"):
        own = any(name in field_types(cls) for cls in _classes({group: KINDS[group]}))  # of another kind of the group
        found = [] if own else [option for option in options_named(name, tree) if option.endswith(f".{name}")]
        if found:
            value = f"={typed[error.option]}" if error.option in typed else ""
            fix = f"did you mean {' or '.join(f'{option}{value}' for option in found)}?"
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
    if kind not in kinds:
        report(ConfigError(f"{group}.kind", kind, why="is not known", fix=did_you_mean(str(kind), kinds)))
        return None
    cls = component_class(group, kind)
    return build(cls, expand_homes(cls, values) if expands_home else values, path=group, report=report)


def run_to_tree(run: Run) -> dict[str, Any]:
    """Return the plain tree that ``build_run`` turns back into an equal run."""
    tree: dict[str, Any] = to_tree(run)
    return tree


def default_run_name(model_name: str) -> str:
    """Return the name of a run of a model: the last part of a local folder's path or of a hub name."""
    if "/" not in model_name and model_name not in (".", ".."):
        return model_name
    return Path(os.path.abspath(os.path.expanduser(model_name))).name or "model"  # noqa: PTH100, PTH111 (links stay)
