"""Run: all groups together, and the checks that need more than one of them."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from launcher.activation import Activation
from launcher.attention import Attention
from launcher.backends.base import Backend
from launcher.benchmarks.base import Benchmark, NoBenchmark
from launcher.checkpoint.policy import Checkpoint
from launcher.compile import Compile
from launcher.component import Component
from launcher.data.base import Data
from launcher.errors import ConfigError
from launcher.jobs.base import BatchedJob, Job
from launcher.models.base import Model
from launcher.optim.adamw import AdamW
from launcher.optim.schedule import Schedule
from launcher.parallel.base import Parallel
from launcher.paths import PathText, expand_homes, named_paths
from launcher.precision import Precision
from launcher.profile import Profile
from launcher.quantization.base import NoQuantization, Quantization
from launcher.quantization.methods import METHODS
from launcher.rundir import run_name_of
from launcher.schema import NO_SUCH_OPTION, Report, build, defaults, field_types, to_tree
from launcher.suggest import did_you_mean
from launcher.trackers.base import Tracker

KINDS: dict[str, dict[str, str]] = {
    "job": {
        "train": "launcher.jobs.train:Train",
        "benchmark": "launcher.jobs.benchmark:Measure",
        "evaluate": "launcher.jobs.evaluate:Evaluate",
        "quantize": "launcher.jobs.quantize:Quantize",
        "generate": "launcher.jobs.generate:Generate",
        "serve": "launcher.jobs.serve:Serve",
        "verify": "launcher.jobs.verify:Verify",
    },
    "model": {
        "gpt2": "launcher.models.gpt2:Gpt2",
        "llama": "launcher.models.llama:Llama",
        "smollm2": "launcher.models.smollm2:SmolLm2",
        "hf": "launcher.models.hf:Hf",
    },
    "data": {
        "text": "launcher.data.text:Text",
        "hf": "launcher.data.hf:HfData",
        "synthetic": "launcher.data.synthetic:Synthetic",
    },
    "parallel": {
        "single": "launcher.parallel.replicated:Single",
        "ddp": "launcher.parallel.replicated:Ddp",
        "deepspeed_pipeline": "launcher.parallel.deepspeed_pipeline:DeepSpeedPipeline",
        "fsdp": "launcher.parallel.fsdp:Fsdp",
        "pipeline": "launcher.parallel.pipeline:Pipeline",
        "zero": "launcher.parallel.zero:Zero",
    },
    "optimizer": {"adamw": "launcher.optim.adamw:AdamW"},
    "schedule": {
        "constant": "launcher.optim.schedule:Constant",
        "linear": "launcher.optim.schedule:Linear",
        "cosine": "launcher.optim.schedule:Cosine",
    },
    "quantization": {
        "none": "launcher.quantization.base:NoQuantization",
        **{method.kind: f"launcher.quantization.methods:{method.__name__}" for method in METHODS.values()},
    },
    "precision": {
        "fp32": "launcher.precision:Fp32",
        "tf32": "launcher.precision:Tf32",
        "bf16": "launcher.precision:Bf16",
        "fp16": "launcher.precision:Fp16",
        "fp8": "launcher.precision:Fp8",
    },
    "activation": {
        "none": "launcher.activation:Keep",
        "full": "launcher.activation:Recompute",
        "every_k": "launcher.activation:RecomputeEvery",
        "offload": "launcher.activation:Offload",
    },
    "attention": {
        "sdpa": "launcher.attention:Sdpa",
        "eager": "launcher.attention:Eager",
        "flash": "launcher.attention:Flash",
        "flex": "launcher.attention:Flex",
    },
    "compile": {"false": "launcher.compile:Interpreted", "true": "launcher.compile:CompiledBlocks"},
    "checkpoint": {"policy": "launcher.checkpoint.policy:Checkpoint"},
    "benchmark": {
        "none": "launcher.benchmarks.base:NoBenchmark",
        "activation": "launcher.benchmarks.activation:ActivationBenchmark",
        "attention": "launcher.benchmarks.attention:AttentionBenchmark",
        "quantization": "launcher.benchmarks.quantization:QuantizationBenchmark",
        "cache": "launcher.benchmarks.result_cache:ResultCacheBenchmark",
        "batching": "launcher.benchmarks.batching:BatchingBenchmark",
        "collectives": "launcher.benchmarks.collectives:CollectivesBenchmark",
        "data": "launcher.benchmarks.data:DataBenchmark",
        "checkpoint": "launcher.benchmarks.checkpoint:CheckpointBenchmark",
        "memory": "launcher.benchmarks.memory:MemoryBenchmark",
        "pipeline": "launcher.benchmarks.pipeline:PipelineBenchmark",
        "serving": "launcher.benchmarks.serving:ServingBenchmark",
    },
    "profile": {"false": "launcher.profile:Profile", "true": "launcher.profile:TorchProfile"},
    "tracker": {"wandb": "launcher.trackers.wandb:Wandb", "local": "launcher.trackers.base:Local"},
    "backend": {
        "deepspeed": "launcher.backends.deepspeed:Deepspeed",
        "kubernetes": "launcher.backends.kubernetes.backend:Kubernetes",
        "local": "launcher.backends.local:Local",
        "slurm": "launcher.backends.slurm.backend:Slurm",
        "ssh": "launcher.backends.ssh:Ssh",
    },
}
"""Every component, by group and kind: a new one is its file, its YAML and a line here."""


YOUNGER_GROUPS: dict[str, dict[str, Any]] = {"quantization": {"kind": "none"}, "profile": {"kind": "false"}}
"""Groups that runs on disk may lack because they were not there yet, and what such runs did."""


def component_class(group: str, kind: str) -> type[Component]:
    """Import and return the class that a ``kind`` names."""
    module, _, name = KINDS[group][kind].partition(":")
    found: type[Component] = getattr(importlib.import_module(module), name)
    return found


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
    activation: Activation
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
    tree: Mapping[str, Any], report: Report, *, typed: Mapping[str, str] = MappingProxyType({})
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
            report(ConfigError(key, why=NO_SUCH_OPTION, fix=suggestion(key, tree, typed=typed)))
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
        parts["run"] = replace(options, name=run_name_of(model.name))
    return Run(**parts)


def suggestion(key: str, tree: Mapping[str, Any], *, typed: Mapping[str, str] = MappingProxyType({})) -> str:
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


def _report_elsewhere(tree: Mapping[str, Any], typed: Mapping[str, str], report: Report, error: ConfigError) -> None:
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
    group: str, kinds: Mapping[str, str], given: Any, report: Report, *, expands_home: bool
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
