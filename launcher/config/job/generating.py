"""Options that the jobs generate and serve share: engine, batching, limits, tokenizer."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from launcher.config.adapter_folder import (
    LORA_BYTES,
    AdapterFolder,
    AdapterUse,
    adapter_label,
    read_adapter_folder,
    validate_adapter_fits,
)
from launcher.config.data.chat_template import find_template
from launcher.config.inference import BatchingMode, EngineLimits, Speculation, validate_engine
from launcher.config.model.linear_layers import module_sizes
from launcher.config.paths import PathText
from launcher.config.profile import ProfileUnit
from launcher.config.run import COMPUTING_GROUPS, LEARNING_GROUPS, Job, Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.utils.files import exists
from launcher.utils.system import child_environment
from launcher.utils.text import bytes_text, counted

_VLLM_PROBE_TIMEOUT_S = 30.0
VLLM_REMEDY = "python -m venv ENV && ENV/bin/pip install vllm, then set job.vllm_python=ENV/bin/python"


_OF_BATCHES = ("max_batch_size", "max_wait_s", "bucket_size")

_UNUSED_BY_ENGINE: Mapping[str, tuple[str, ...]] = {
    "echo": (
        *("batching", "kv_cache_tokens", "prefill_chunk_size", "enable_prefix_caching", "aging_s", *_OF_BATCHES),
        *("top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "warm_up", "sparse_kernels"),
    ),
    "transformers": ("kv_cache_tokens", "sparse_kernels", *_OF_BATCHES),
    "vllm": ("kv_cache_tokens", "prefill_chunk_size", "sparse_kernels", *_OF_BATCHES),
}
"""Options that other engines than the launcher's own have no use for."""

_OF_SPECULATION = ("speculation_layers", "speculation_tokens", "speculation_adaptive")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,99}")

_SHAPE_OF_ECHO = ("name", "max_position_embeddings", "vocab_size")
"""Options of a model on which the echo of its prompts depends."""
_UNUSED_BY_BATCHING: Mapping[str, tuple[str, ...]] = {
    "continuous": _OF_BATCHES,
    "none": _OF_BATCHES,
    "static": ("bucket_size",),
}
"""Options that a way of batching has no use for."""


@dataclass(frozen=True, kw_only=True)
class GeneratingJob(Job):
    """A job whose ranks generate text for many requests."""

    engine: Literal["paged", "transformers", "vllm", "echo"] = "paged"
    """``paged`` (the launcher's, any device), ``transformers``, ``vllm`` or ``echo`` (no model).
    ``transformers`` is that library's continuous batching, greedy and on GPUs; ``vllm`` starts vLLM in an environment
    of its own; ``echo`` repeats prompts."""

    tokenizer: PathText = "model"
    """``model`` (its own), ``data`` (the data group's), ``bytes`` (a token each), or a folder."""

    chat_template: PathText | None = None
    """Chat template for chats that name none: a name or a Jinja file.
    ``null`` takes the tokenizer's default.
    Names: one of the tokenizer's templates, ``chatml``, ``gemma``, ``llama3``, ``plain``, ``zephyr``."""

    adapters: dict[str, PathText] = field(default_factory=dict)
    """LoRA adapters by name: PEFT folders, runs or checkpoints.
    The field ``model`` of a request chooses one, or the base model. Requests for any of them share a batch, and get
    what the base model with that adapter alone would answer."""

    batching: BatchingMode = "continuous"
    """``continuous`` (at every step), ``dynamic``, ``static``, or ``none`` (one at a time).
    ``continuous`` admits and completes requests at every step; ``dynamic`` waits briefly for requests of similar length
    and ends with the longest; ``static`` does so in order of arrival, unsorted; ``none`` is one request after the
    other."""

    max_num_seqs: int = 32
    """Requests that are processed at the same time under ``continuous``."""

    kv_cache_tokens: int | None = None
    """Capacity of the KV cache in tokens; ``null`` fits max_num_seqs sequences of full length.
    The default takes at most a quarter of the memory that is free at the start."""

    prefill_chunk_size: int = 256
    """Prompt tokens in one step; larger chunks delay the next tokens of other requests."""

    enable_prefix_caching: bool = True
    """Whether keys and values of equal prefixes are computed once and shared."""

    max_batch_size: int = 16
    """Requests in a batch under ``dynamic`` and ``static``."""

    max_wait_s: float = 0.1
    """How long the first request of a batch waits for others under ``dynamic`` and ``static``."""

    bucket_size: int = 32
    """Under ``dynamic``, prompts whose lengths round up to the same multiple share a batch."""

    aging_s: float = 10.0
    """Seconds of waiting that count as one step of priority."""

    speculation: Speculation = "none"
    """``early_exit`` drafts tokens with the first layers, and verifies with the others.
    Answers are those without it: greedy and seeded ones token for token, others in distribution."""

    speculation_layers: int | None = None
    """Layers that draft under ``early_exit``; ``null`` takes a third of the model's."""

    speculation_tokens: int = 4
    """Tokens of a draft at most."""

    speculation_adaptive: bool = True
    """Whether drafts become shorter where few tokens are accepted, and end where they cost time.
    Both ways are timed in turn, for each size of batch."""

    sparse_kernels: bool = True
    """Whether 2:4 matrices are stored and multiplied without their zeros (``engine=paged``).
    Of each four consecutive inputs of such a matrix two are zero. On CPUs results are the same, bit for bit."""

    vllm_python: PathText | None = None
    """The interpreter of an environment that has vLLM, for ``engine=vllm``."""

    echo_step_s: float = 0.0
    """Seconds that a step of ``engine=echo`` takes."""

    @property
    def profile_unit(self) -> ProfileUnit:
        """Steps of the engine, in the process that computes them."""
        return "engine steps"

    @property
    def limits(self) -> EngineLimits:
        """Return the limits of the engine."""
        return EngineLimits(**{field.name: getattr(self, field.name) for field in fields(EngineLimits)})

    @property
    def uses_bf16_kernels(self) -> bool:
        """Whether the engine is the launcher's own."""
        return self.engine == "paged"

    @property
    def reads_data(self) -> bool:
        """Whether its tokenizer is the one that the group data trains or names."""
        return getattr(self, "tokenizer", "") == "data"

    @property
    def num_replicas(self) -> int:
        """How many engines a rank keeps, each with the whole of the rank's weights."""
        return 1

    def name_of(self, run: Run) -> str:
        """Return the name by which requests choose the base model."""
        return run.model.name

    def adapter_folders(self) -> Mapping[str, AdapterFolder]:
        """Return the adapters that can be read on this machine, by name."""
        found = {}
        for name, value in self.adapters.items():
            with contextlib.suppress(ConfigError):  # which validate_machine reports
                found[name] = read_adapter_folder(f"job.adapters.{name}", value, use=AdapterUse.ENGINE)
        return found

    def is_model_parallel(self, run: Run) -> bool:
        """Return whether several ranks form one engine, by tensor or pipeline parallelism."""
        dims = run.parallel.dims(1)
        return dims.tensor > 1 or dims.pipeline > 1

    def unused_groups(self, run: Run) -> frozenset[str]:
        """Add what only optimizer steps use, and the data where its tokenizer is not taken."""
        data = set() if self.reads_data else {"data"}
        return super().unused_groups(run) | (COMPUTING_GROUPS if self.engine == "echo" else LEARNING_GROUPS) | data

    def names_itself(self, run: Run) -> str:
        """Add the engine that has no model."""
        return f"job={self.kind} job.engine=echo" if self.engine == "echo" else super().names_itself(run)

    def unused_model_options(self, run: Run) -> Mapping[str, str]:
        """Return the model options that the echo engine ignores; weights may bring the tokenizer."""
        if self.engine != "echo":
            return {}
        used = {*_SHAPE_OF_ECHO, *(["weights"] if self.tokenizer == "model" and run.model.local_weights else [])}
        why = "job.engine=echo repeats prompts and computes nothing with a model"
        return {
            field.name: why
            for field in fields(run.model)
            if field.name not in used and getattr(run.model, field.name) != field.default
        }

    def unused_options(self, run: Run) -> Mapping[str, str]:
        """Return the non-default options that the engine, or its batching mode, ignores."""
        named = f"job.engine={self.engine}"
        names = dict.fromkeys(_UNUSED_BY_ENGINE.get(self.engine, ()), f"{named} does not use it")
        if self.engine == "paged":
            why = f"job.batching={self.batching} does not use it"
            names |= dict.fromkeys(_UNUSED_BY_BATCHING.get(self.batching, ()), why)
        if self.speculation == "none":
            names |= dict.fromkeys(_OF_SPECULATION, "job.speculation=none drafts nothing")
        for engine, option in (("echo", "echo_step_s"), ("vllm", "vllm_python")):
            if self.engine != engine:
                names[option] = f"it is for job.engine={engine}, and {named}"
        usual = {field.name: field.default for field in fields(self)}
        return {name: why for name, why in names.items() if getattr(self, name, ()) not in (usual.get(name), ())}

    def unused_strategy(self, run: Run) -> str:
        """Return that a strategy shards nothing, unless it makes one engine of several ranks."""
        if self.is_model_parallel(run) or run.parallel.kind == "deepspeed_pipeline":
            return ""  # another check rejects the latter
        return f"each engine of job={self.kind} holds the whole model, unless parallel=tensor or pipeline splits it"

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject what the engine cannot compute, and other ranks than one engine is made of."""
        yield from super().validate_run(run, world_size=world_size)
        most = run.parallel.dims(1).product
        if self.is_model_parallel(run) and self.engine != "paged":
            why = f"parallel={run.parallel.kind} makes one engine of {most} ranks, which only job.engine=paged supports"
            yield self.error("engine", why, "set job.engine=paged or parallel=single")
        if self.is_model_parallel(run) and world_size != most:
            why = f"parallel={run.parallel.kind} makes an engine of {counted(most, 'rank')}"
            yield ConfigError("backend.ranks", world_size, why=why, fix=f"set backend.ranks={most}")
        if self.engine == "vllm":
            yield from self._validate_for_vllm(run)
        yield from self._validate_adapters(run)
        yield from self._validate_speculation(run)
        if run.profile.kind == "true" and self.engine != "paged":
            why = f"engine={self.engine} computes nothing that torch's profiler could record"
            yield ConfigError("profile", "true", why=why, fix="set profile=false or job.engine=paged")
        if self.engine in ("paged", "transformers"):
            together = most if self.is_model_parallel(run) and self.engine == "paged" else 1
            yield from validate_engine(run, world_size=together, engine=self.engine)

    def _validate_adapters(self, run: Run) -> Iterator[ConfigError]:
        if not self.adapters:
            return
        if self.engine != "paged":
            why = f"job.engine={self.engine} serves the base model alone"
            yield self.error("adapters", why, "set job.engine=paged, or leave job.adapters out")
        if run.model.image_text() is not None:
            why = f"{run.model.name} takes images, and adapters of such models are not applied by request"
            yield self.error("adapters", why, "set model.adapter to one of them")
        if self.is_model_parallel(run):
            why = f"parallel={run.parallel.kind} splits the model's layers over ranks, and adapters are not split"
            yield self.error("adapters", why, "set parallel=single, or merge the adapter and serve that folder")
        if run.model.adapter is not None:
            why = "job.adapters apply to the model without an adapter, and model.adapter adds one to it"
            fix = f"set job.adapters.NAME={run.model.adapter} instead"
            yield ConfigError("model.adapter", run.model.adapter, why=why, fix=fix)
        for name in self.adapters:
            option = f"job.adapters.{name}"
            if not _ADAPTER_NAME.fullmatch(name):
                why = "is not a name that a request can send: letters, digits and . _ : / @ - only, at most 100"
                yield ConfigError("job.adapters", name, why=why, fix="choose such a name: job.adapters.support=FOLDER")
            elif name == self.name_of(run):
                why = f"{name} is the name of the base model, so requests could not choose between them"
                yield ConfigError(option, self.adapters[name], why=why, fix="choose another name for the adapter")

    def _validate_speculation(self, run: Run) -> Iterator[ConfigError]:
        """Yield why nothing can be drafted, or drafts would have no effect."""
        if self.speculation == "none":
            return
        off = "set job.speculation=none"
        if self.engine != "paged":
            why = f"job.engine={self.engine} drafts nothing: only job.engine=paged does"
            yield self.error("speculation", why, f"{off}, or job.engine=paged")
        if self.batching != "continuous":
            why = f"job.batching={self.batching} is for comparisons, and computes one token of a sequence at a time"
            yield self.error("speculation", why, f"{off}, or job.batching=continuous")
        if run.parallel.dims(1).pipeline > 1:
            why = f"parallel={run.parallel.kind} puts first and last layers on different ranks"
            yield self.error("speculation", why, f"{off}, or parallel=single")
        if getattr(self, "num_beams", 1) > 1:
            why = f"beam search (job.num_beams={getattr(self, 'num_beams', 1)}) drafts nothing"
            yield self.error("speculation", why, f"{off}, or job.num_beams=1")
        shape = run.model.shape()
        count, layers = 0 if shape is None else shape.num_hidden_layers, self.speculation_layers
        if count == 1:
            why = f"{run.model.name} has one layer, so there is none to draft with"
            yield self.error("speculation", why, off)
        elif count and layers is not None and layers >= count:
            why = f"{run.model.name} has {count} layers, and at least one must be left to verify"
            yield self.error("speculation_layers", why, f"set job.speculation_layers={max(1, count // 3)}")

    def _validate_for_vllm(self, run: Run) -> Iterator[ConfigError]:
        if self.vllm_python is None:
            why = "vLLM needs its own environment, and job.vllm_python is not set"
            yield self.error("engine", why, VLLM_REMEDY)
        if run.model.quantization != "none":
            why = "vLLM loads the weights as they are in the folder"
            yield ConfigError("model.quantization", run.model.quantization, why=why, fix="set job.engine=paged")
        if run.model.weights == "random":
            why = "vLLM loads weights from a folder, and random weights have none"
            fix = "set model.weights=pretrained or a folder"
            yield ConfigError("model.weights", run.model.weights, why=why, fix=fix)

    def validate_machine(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield an interpreter that has no vLLM, where it is asked for."""
        yield from super().validate_machine(run, run_dir)
        yield from validate_vllm(self)
        yield from self._validate_template(run)
        yield from self._validate_adapter_folders(run)

    def _validate_adapter_folders(self, run: Run) -> Iterator[ConfigError]:
        """Yield the adapters that the engine cannot apply to the model."""
        modules = module_sizes(run.model) if self.adapters else None
        for name, value in self.adapters.items():
            option = f"job.adapters.{name}"
            try:
                found = read_adapter_folder(option, value, use=AdapterUse.ENGINE)
            except ConfigError as error:
                yield error
                continue
            if modules is not None:
                yield from validate_adapter_fits(option, found, modules.linear, model=run.model.name)

    def _validate_template(self, run: Run) -> Iterator[ConfigError]:
        """Yield an error for a chat template that does not exist, if the tokenizer's folder is here."""
        if self.chat_template is None or self.tokenizer in ("bytes", "data"):
            return
        for name in (run.model.weights, run.model.name) if self.tokenizer == "model" else (self.tokenizer,):
            folder = Path(name).expanduser()
            if not exists(folder / "tokenizer.json"):
                continue
            try:
                find_template(self.chat_template, folder, option="job.chat_template")
            except ConfigError as error:
                yield error
            return

    def describe_tokenizer(self, run: Run) -> str:
        """Return where the tokenizer comes from."""
        if self.tokenizer != "model":
            return f"job.tokenizer={self.tokenizer}"
        try:
            source = run.model.tokenizer_source()
        except ConfigError:  # validate_inputs says what to set
            source = None
        return f"job.tokenizer=model, {source} on the hub" if isinstance(source, str) else "job.tokenizer=model"

    def describe_speculation(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield which layers draft, and how far."""
        if self.speculation == "none":
            return
        shape = run.model.shape()
        layers = self.speculation_layers or (None if shape is None else self.limits.exit_layer(shape.num_hidden_layers))
        of = "a third of the layers drafts" if layers is None else f"the first {counted(layers, 'layer')} draft"
        of = of.replace("1 layer draft", "layer drafts")
        ends = "ends where it costs time" if self.speculation_adaptive else "always on"
        yield "speculation", f"{of} at most {counted(self.speculation_tokens, 'token')}; {ends}"

    def describe_adapters(self) -> Iterator[tuple[str, str]]:
        """Yield a line with the adapters, their largest rank and their size."""
        found = self.adapter_folders()
        if self.adapters:
            named = [
                f"{name} ({adapter_label(value)}, rank {found[name].max_rank})" if name in found else name
                for name, value in self.adapters.items()
            ]
            size = bytes_text(LORA_BYTES * sum(adapter.numel for adapter in found.values()))
            yield "adapters", f"{', '.join(named)}; {size} in an engine"

    def validate(self) -> Iterator[ConfigError]:
        """Reject sizes that nothing fits in."""
        yield from super().validate()
        yield from self.validate_minimum(
            1, "max_num_seqs", "kv_cache_tokens", "prefill_chunk_size", "max_batch_size", "bucket_size"
        )
        yield from self.validate_minimum(1, "speculation_layers", "speculation_tokens")
        yield from self.validate_minimum(0, "seed", "max_wait_s", "echo_step_s")
        if self.engine in ("transformers", "vllm") and self.batching != "continuous":
            yield self.error(
                "batching", f"engine={self.engine} batches continuously only", "set job.batching=continuous"
            )
        if self.chat_template is not None and self.tokenizer in ("bytes", "data"):
            yield self.error("chat_template", f"job.tokenizer={self.tokenizer} has no chat templates", "leave it out")
        if self.chat_template in ("auto", "none"):
            fix = "leave it out for the tokenizer's default, or give a name or a Jinja file"
            yield self.error("chat_template", "is a value of data.chat_template alone", fix)
        if self.chat_template is not None and self.engine == "vllm" and self.kind == "serve":
            why = "vLLM's server uses its own template, so this option would have no effect"
            yield self.error("chat_template", why, "set job.engine=paged, or leave it out")
        if self.aging_s <= 0:
            yield self.error("aging_s", "must be above 0", "set job.aging_s=10")


def validate_vllm(job: GeneratingJob) -> Iterator[ConfigError]:
    """Yield an interpreter that does not run, or whose environment has no vLLM."""
    if job.engine != "vllm" or job.vllm_python is None:
        return
    python = Path(job.vllm_python).expanduser()
    if not os.access(python, os.X_OK) or python.is_dir():
        yield job.error("vllm_python", "is not an executable file", VLLM_REMEDY)
        return
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        answer = subprocess.run(
            [python, "-c", question],
            env=child_environment(),
            capture_output=True,
            timeout=_VLLM_PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield job.error("vllm_python", f"does not run: {error}", VLLM_REMEDY)
        return
    if answer.returncode:
        yield job.error("vllm_python", "its environment has no vLLM", VLLM_REMEDY)
