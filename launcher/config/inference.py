"""Shared parts of generating jobs: limits, API keys, templates, unsupported combinations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.config.model.config_json import attention_windows, non_attention_layers
from launcher.config.model.transformers_support import attention_support
from launcher.config.parallel.pipeline import Pipeline
from launcher.config.run import Run
from launcher.errors import ConfigError

BatchingMode = Literal["continuous", "dynamic", "static", "none"]
Speculation = Literal["none", "early_exit"]

IMAGE_FAMILIES = ("idefics3", "llava", "qwen2_vl", "smolvlm")
"""Types of image-text models that the engine ``paged`` serves.
Their tokens attend to earlier ones only, also those of images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """Capacity, batching, drafts and kernels of an engine, as ``GeneratingJob`` has them."""

    batching: BatchingMode = "continuous"
    max_num_seqs: int = 32
    kv_cache_tokens: int | None = None
    prefill_chunk_size: int = 256
    enable_prefix_caching: bool = True
    max_batch_size: int = 16
    max_wait_s: float = 0.1
    bucket_size: int = 32
    aging_s: float = 10.0
    sparse_kernels: bool = True
    speculation: Speculation = "none"
    speculation_layers: int | None = None
    speculation_tokens: int = 4
    speculation_adaptive: bool = True

    def exit_layer(self, num_layers: int) -> int:
        """Return how many layers of a model draft; by default a third."""
        return self.speculation_layers or max(1, num_layers // 3)

    def rank(self, *, arrived_s: float, priority: int) -> float:
        """Return a request's rank in the queue, smallest first.

        Waiting for ``aging_s`` compensates for one priority.
        """
        return arrived_s / self.aging_s - priority


_SHARE_PER_CLIENT = 0.75


def connections_per_client(max_connections: int) -> int:
    """Return how many of a server's connections one address may hold."""
    return max(1, int(_SHARE_PER_CLIENT * max_connections))


API_KEYS_VARIABLE = "LAUNCHER_API_KEYS"


def validate_api_keys_variable(environ: Mapping[str, str]) -> Iterator[ConfigError]:
    """Yield a variable of keys that is set and holds none."""
    if API_KEYS_VARIABLE in environ and not api_keys_from_environ(environ):
        why = "it is set but has no key, so anyone could use the server"
        fix = f"set it to keys separated by commas, or run: unset {API_KEYS_VARIABLE}"
        # not the name alone: what follows a name of keys and a colon is hidden as a secret
        yield ConfigError(f"the variable {API_KEYS_VARIABLE} of the environment", why=why, fix=fix)
    for why in _unusable_keys(api_keys_from_environ(environ)):
        yield ConfigError(f"the variable {API_KEYS_VARIABLE} of the environment", why=why, fix=_KEY_RULE)


def api_keys_of_file(file: str) -> tuple[str, ...]:
    """Return the API keys of ``job.api_keys_file``: one a line, but for lines that begin with #.

    Raises:
        ConfigError: it cannot be read, holds no key, or one that no client can send.
    """
    option = "job.api_keys_file"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")  # some editors write a mark before the first key
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(option, file, why=why, fix="give a text file with one key per line") from error
    keys = tuple(key for line in text.split("\n") if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise ConfigError(option, file, why="has no key", fix="write one key per line into it")
    for why in _unusable_keys(keys):
        raise ConfigError(option, file, why=why, fix=_KEY_RULE)
    return keys


_SENDABLE_KEY = re.compile(r"[!-~]([ -~]{0,4094}[!-~])?")
_KEY_RULE = "use letters, digits and punctuation of ASCII, at most 4,096 of them"


def _unusable_keys(keys: Sequence[str]) -> Iterator[str]:
    """Yield why a key is refused; the text never holds the key."""
    for number, key in enumerate(keys, 1):
        if not _SENDABLE_KEY.fullmatch(key):
            yield f"its key {number} cannot be sent in an Authorization header"


def api_keys_from_environ(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the API keys of the environment: separated by commas or line ends."""
    keys = re.split(r"[,\n]", environ.get(API_KEYS_VARIABLE, ""))
    return tuple(key.strip() for key in keys if key.strip())


def validate_engine(run: Run, *, world_size: int, engine: str = "paged") -> Iterator[ConfigError]:
    """Yield why an engine cannot compute what a run asks for.

    Args:
        run: of a job that generates.
        world_size: ranks that hold one model between them.
        engine: ``paged`` or ``transformers``.
    """
    if engine == "paged" and run.attention.kind != "sdpa":
        why = "job.engine=paged computes paged attention by kernels of its own"
        yield ConfigError("attention", run.attention.kind, why=why, fix="set attention=sdpa")
    if engine == "paged" and (why_not := _unsupported_reason(run)) is not None:
        yield unsupported_model(str(run.model.family()), why_not)
    yield from _validate_images(run, world_size=world_size, engine=engine)
    if engine == "transformers" and run.attention.kind == "flex":
        why = "Transformers' continuous batching supports eager, sdpa and flash only"
        yield ConfigError("attention", run.attention.kind, why=why, fix="set attention=sdpa")
    if run.compile.kind != "false":
        why = f"job.engine={engine} cannot be compiled: its shapes change with every step"
        yield ConfigError("compile", run.compile.kind, why=why, fix="set compile=false")
    if run.precision.kind == "fp8":
        why = f"job.engine={engine} does not support fp8"
        yield ConfigError("precision", run.precision.kind, why=why, fix="set precision=bf16")
    dims = run.parallel.dims(world_size)
    spread = {"fsdp": dims.tensor, "pipeline": dims.pipeline}.get(run.parallel.kind)
    if world_size > 1 and spread != world_size:
        why = f"job.engine=paged splits a model over {world_size} ranks by tensor or pipeline parallelism only"
        fix = f"set parallel=tensor parallel.tensor={world_size}, or parallel=pipeline parallel.stages={world_size}"
        yield ConfigError("parallel", run.parallel.kind, why=why, fix=fix)
    if isinstance(run.parallel, Pipeline):
        yield from _unused_pipeline_options(run.parallel)


def _validate_images(run: Run, *, world_size: int, engine: str) -> Iterator[ConfigError]:
    """Yield why an engine cannot hold a model that takes images."""
    found = run.model.image_text()
    if found is None:
        return
    if engine == "transformers":
        why = f"{run.model.name} takes images, and Transformers' continuous batching takes text only"
        yield ConfigError("job.engine", engine, why=why, fix="set job.engine=paged")
    elif found.family not in IMAGE_FAMILIES:
        yield unsupported_model(found.family, "computes images in a way that the engine does not know")
    if world_size > 1:
        why = f"{run.model.name} takes images, and an engine of several ranks takes text only"
        yield ConfigError("parallel", run.parallel.kind, why=why, fix="set parallel=single backend.ranks=1")


def validate_warm_up(run: Run, option: str, shapes: Sequence[tuple[int, int]]) -> Iterator[ConfigError]:
    """Yield the shapes (sequences, tokens) that are longer than the model's longest sequence."""
    sizes = run.model.shape()
    for at, (_, tokens) in enumerate(shapes):
        if sizes is not None and tokens > sizes.max_position_embeddings:
            most = sizes.max_position_embeddings
            why = f"{run.model.name} takes at most {most} tokens"
            yield ConfigError(f"{option}[{at}]", tokens, why=why, fix=f"set {option}=[[1,{most}]]")


def _unsupported_reason(run: Run) -> str | None:
    """Return why paged attention does not support a model, by its files.

    Ranks also compare results.
    """
    config = run.model.stored_config()
    marks = attention_support(str(config.get("model_type"))) if config is not None else None
    if config is None or marks is None:
        return None
    if others := [*non_attention_layers(config), *(key for key, _ in attention_windows(config))]:
        return f"keeps state other than the keys and values of all tokens ({', '.join(others)})"
    if marks.is_stateful:
        return "keeps state other than the keys and values of all tokens (a state)"
    return (
        None if marks.attention_backend and marks.sdpa else "computes attention by code that the engine cannot replace"
    )


def unsupported_model(family: str, why: str) -> ConfigError:
    """Return the error for a model of that family."""
    why = f"{family} {why}, which a paged KV cache cannot hold exactly"
    fix = "set job.engine=transformers or job.engine=vllm on a GPU, or choose a model with plain causal attention"
    return ConfigError("job.engine", "paged", why=why, fix=fix)


def _unused_pipeline_options(parallel: Pipeline) -> Iterator[ConfigError]:
    """Yield options that say how a pipeline trains, and are not what they are by default."""
    usual = Pipeline(stages=parallel.stages)
    for name in ("schedule", "micro_batches", "chunks_per_rank", "balance", "data"):
        value = getattr(parallel, name)
        if value != getattr(usual, name):
            why = "applies to training only, not to an inference engine"
            yield parallel.error(name, why, f"leave parallel.{name} out")
