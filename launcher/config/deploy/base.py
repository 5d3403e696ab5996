"""Fields of everything that ``launch deploy`` renders, and of everything with a container."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar

from launcher.config.backend.base import PROCESS_BYTES
from launcher.config.job.serve import Serve
from launcher.config.kubernetes_objects import (
    NAME_RULE,
    dashed,
    is_service_name,
    parse_quantity,
    validate_image,
    validate_interpreter,
)
from launcher.config.paths import PathText
from launcher.config.run import Deploy, Run
from launcher.errors import ConfigError
from launcher.protocol.plan import Host, Plan
from launcher.utils.text import bytes_text, counted

MAX_NAME = 36
"""Longest name: what is derived from it must stay a label of 63 characters."""
SERVER_NAME = "server"
"""Name of the host that a server is planned for."""
_GIB = 1 << 30
_SERVER_BYTES = _GIB
"""The process that handles HTTP, and the launcher's own."""


def kv_cache_bytes(run: Run) -> int:
    """Return the bytes of all engines' KV caches, of as many tokens as ``run.job`` asks for."""
    shape, job = run.model.shape(), run.job
    if shape is None or not isinstance(job, Serve):
        return 0
    tokens = job.kv_cache_tokens or job.max_num_seqs * shape.max_position_embeddings
    width = shape.hidden_size // shape.num_attention_heads * shape.num_key_value_heads
    return job.replicas * tokens * 2 * shape.num_hidden_layers * width * run.precision.compute_bytes


@dataclass(frozen=True)
class UnusedOptions:
    """Options of a deployment without effect, for one reason."""

    names: tuple[str, ...]
    why: str
    """Names the option that decides."""
    instead: str = ""
    """What to set so that they have an effect."""


@dataclass(frozen=True, kw_only=True)
class RenderedDeploy(Deploy):
    """Files that ``launch deploy`` writes into a folder."""

    summary_fields: ClassVar[tuple[str, ...]] = ("out",)

    out: PathText
    """Folder to write; files in it that ``launch deploy`` did not write are never changed."""

    name: str | None = None
    """Name of everything that is rendered; ``null`` takes ``run.name``."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a name that a cluster or a host name refuses, and an empty folder."""
        yield from super().validate()
        if self.name is not None and not (is_service_name(self.name) and len(self.name) <= MAX_NAME):
            why = "is not a valid name of a server in a cluster"
            yield self.error("name", why, f"use at most {MAX_NAME} {NAME_RULE}, and a letter first")
        if not self.out.strip():
            yield self.error("out", "is empty", "set deploy.out=DIR")

    def object_name(self, run: Run) -> str:
        """Return the name of everything that is rendered: a label that begins with a letter."""
        if self.name is not None:
            return self.name
        name = dashed(run.run.name)
        if not name or not name[0].isalpha():
            name = f"run-{name}"
        return name[:MAX_NAME].strip("-")

    def hosts(self, run: Run) -> tuple[Host, ...]:
        """Return one host with the ranks of one engine."""
        return (Host(name=SERVER_NAME, slots=run.job.max_ranks(run) or 1, is_probed=False),)

    def unused_options(self, run: Run) -> Iterator[UnusedOptions]:
        """Yield the options that have no effect beside the others, or on this job."""
        yield from ()

    def validate_used(self, run: Run) -> Iterator[ConfigError]:
        """Reject values of options that have no effect; their defaults are accepted."""
        defaults = {
            each.name: each.default if each.default_factory is MISSING else each.default_factory()
            for each in fields(self)
        }
        for unused in self.unused_options(run):
            fix = f"{unused.instead}, or leave it out" if unused.instead else "leave it out"
            for name in unused.names:
                if getattr(self, name) != defaults[name]:
                    yield self.error(name, unused.why, fix)

    def validate_run(self, run: Run, plan: Plan) -> Iterator[ConfigError]:
        """Reject what is no server, and options without effect."""
        yield from super().validate_run(run, plan)
        yield from self.validate_used(run)
        if not isinstance(run.job, Serve):
            fix = f"write launch deploy job=serve … deploy={self.kind}"
            yield ConfigError("job", run.job.kind, why=f"deploy={self.kind} deploys servers", fix=fix)


@dataclass(frozen=True, kw_only=True)
class ContainerDeploy(RenderedDeploy):
    """A server in containers, with what each of them gets."""

    own_ranks: ClassVar[str] = "set backend=local, or leave backend out"
    """What to type instead of a backend."""

    image: str
    """Container image with this program in it, and everything a server needs."""

    python: str = "python"
    """The interpreter in the image."""

    cpus: int = 4
    """Cores of each container."""

    memory: str = "auto"
    """RAM of each container; ``auto`` is what the plan's estimate needs.
    The estimate is weights and KV cache of every engine, 2 GiB for each engine's process and 1 GiB for the server."""

    gpus: int = 0
    """GPUs of each container, one for each rank; 0 computes on the CPU.
    vLLM divides them itself."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject an image, and amounts that leave no server."""
        yield from super().validate()
        yield from self.validate_minimum(1, "cpus")
        yield from self.validate_minimum(0, "gpus")
        yield from validate_interpreter("deploy.python", self.python)
        yield from validate_image("deploy.image", self.image, logins="deploy.image_pull_secrets")
        if self.memory != "auto" and parse_quantity(self.memory) is None:
            yield self.error("memory", "is not an amount of memory", "write it like deploy.memory=64Gi, or auto")

    def hosts(self, run: Run) -> tuple[Host, ...]:
        """Return the container as a host with the ranks of one engine."""
        return (
            Host(
                name=SERVER_NAME,
                slots=run.job.max_ranks(run) or 1,
                devices=("GPU",) * self.gpus,
                device_ids=tuple(map(str, range(self.gpus))),
                cores=self.cpus,
                memory_bytes=parse_quantity(self.memory) or 0,
                python=self.python,
            ),
        )

    def validate_hosts(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Reject fewer GPUs than a container has ranks."""
        ranks = hosts[0].slots
        if 0 < self.gpus < ranks:
            why = f"a container of the engine has {ranks} ranks, each on a GPU of its own"
            yield self.error("gpus", why, f"set deploy.gpus={ranks}")

    def needed_bytes(self, run: Run, plan: Plan) -> int | None:
        """Return the RAM that the container needs; ``None`` where the model's size is unknown."""
        if plan.memory is None:
            return None
        num_engines = max(getattr(run.job, "replicas", 1), plan.world_size // len(plan.hosts))
        needed = num_engines * PROCESS_BYTES + _SERVER_BYTES
        if self.gpus:
            return needed
        needed += plan.memory.per_host_ram
        cache = kv_cache_bytes(run)
        is_chosen = getattr(run.job, "kv_cache_tokens", None) is not None
        return needed + (cache if is_chosen else min(cache, needed // 3))  # by default it takes a quarter at most

    def memory_bytes(self, run: Run, plan: Plan) -> int:
        """Return the RAM of a container, as whole GiB where it follows from the estimate."""
        given = parse_quantity(self.memory)
        if given is not None:
            return given
        needed = self.needed_bytes(run, plan) or 0
        return -(-needed // _GIB) * _GIB

    def validate_run(self, run: Run, plan: Plan) -> Iterator[ConfigError]:
        """Reject a port that only root may listen on, and too little memory."""
        yield from super().validate_run(run, plan)
        if isinstance(run.job, Serve) and run.job.port < 1024:
            why = "the container does not run as root, and ports below 1024 are root's"
            yield ConfigError("job.port", run.job.port, why=why, fix="set job.port=8000")
        if run.backend.kind != "local":
            why = "a container starts its own ranks"
            yield ConfigError("backend", run.backend.kind, why=why, fix=self.own_ranks)
        if isinstance(run.job, Serve):
            yield from self._validate_idle_gpus(run.job.engine, plan.hosts[0].host.slots)
        needed, given = self.needed_bytes(run, plan), parse_quantity(self.memory)
        if needed is None and given is None:
            why = "the size of the model is known only once its files are downloaded"
            yield self.error("memory", why, "set deploy.memory=16Gi, or what the model needs")
        elif needed is not None and given is not None and given < needed:
            why = f"is {bytes_text(given)}, and the plan needs {bytes_text(needed)}: weights, KV cache and processes"
            yield self.error("memory", why, f"set deploy.memory={-(-needed // _GIB)}Gi, or auto")

    def _validate_idle_gpus(self, engine: str, ranks: int) -> Iterator[ConfigError]:
        """Reject GPUs that no rank of a container computes on; vLLM divides them itself."""
        if engine == "echo" and self.gpus:
            yield self.error("gpus", "job.engine=echo computes on no GPU", "leave it out")
        elif engine != "vllm" and self.gpus > ranks:
            idle = counted(self.gpus - ranks, "GPU")
            why = f"a container has {counted(ranks, 'rank')}, each on one GPU, so {idle} would be idle"
            yield self.error("gpus", why, f"set deploy.gpus={ranks}, or parallel=tensor for more ranks")


@dataclass(frozen=True, kw_only=True)
class MountingDeploy(ContainerDeploy):
    """A server in a container that gets files of its machine, each at the same path."""

    def validate_run(self, run: Run, plan: Plan) -> Iterator[ConfigError]:
        """Reject paths that containers would look for elsewhere."""
        yield from super().validate_run(run, plan)
        for option, path in (*served_paths(run), *keys_path(run)):
            if path.startswith("/") and posixpath.normpath(path) == "/":
                yield ConfigError(option, path, why="is the whole file system", fix="name a folder below it")
            elif path.startswith((".", "~")) or (option == "job.api_keys_file" and not path.startswith("/")):
                why = "is relative, and containers do not start in your folder"
                yield ConfigError(option, path, why=why, fix="give the whole path, which is mounted at the same place")


def served_paths(run: Run) -> Iterator[tuple[str, str]]:
    """Yield option and value of each path that a server reads, but for its keys."""
    for option, path in run.paths():
        group = option.partition(".")[0]
        if group in ("job", "model", "adapter", "data") and option != "job.api_keys_file":
            yield option, path


def keys_path(run: Run) -> Iterator[tuple[str, str]]:
    """Yield option and value of the file of API keys, if there is one."""
    file = getattr(run.job, "api_keys_file", None)
    if file is not None:
        yield "job.api_keys_file", file


def mounted_paths(run: Run) -> list[str]:
    """Return paths that a server reads; a container has each at the same place."""
    return sorted({posixpath.normpath(path) for _, path in served_paths(run) if path.startswith("/")})
