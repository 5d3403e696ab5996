"""Job serve: an OpenAI-compatible server, and checks of packages, port and API keys."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from launcher.config.data.images import ImageLimits
from launcher.config.inference import API_KEYS_VARIABLE, api_keys_of_file, validate_api_keys_variable, validate_warm_up
from launcher.config.job.generating import GeneratingJob
from launcher.config.listening import http_address, validate_address, validate_port
from launcher.config.paths import PathText
from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.utils.system import is_loopback, is_network
from launcher.utils.text import bytes_text, counted

_MAX_BODY_BYTES = 16 * 2**20
_TEXT_BODY_BYTES = 2 * 2**20
"""Largest body by default, without images."""
_AROUND_IMAGE_BYTES = 2**16
"""Room in a body for what is not an image."""
_SHUTDOWN_SLACK_S = 20.0
"""Seconds beyond the drain to answer waiting requests, close connections and stop engines.
Enough even on an overloaded machine."""


_OF_IMAGES = ("image_hosts", "max_images", "max_image_pixels", "max_image_bytes", "image_workers", "image_cache_bytes")


@dataclass(frozen=True, kw_only=True)
class Serve(GeneratingJob):
    """An OpenAI-compatible server: one process handles HTTP, each engine is another process."""

    kind: ClassVar[str] = "serve"
    completes_on_signal: ClassVar[bool] = True

    host: str = "127.0.0.1"
    """Address to listen on; ``0.0.0.0`` is all interfaces of the machine."""

    port: int = 8000
    """Port to listen on."""

    served_model_name: str | None = None
    """Model name in clients' requests; ``null`` takes model.name."""

    replicas: int = 1
    """Engines side by side, each with all weights and its share of the cores.
    Only one if several ranks form one engine."""

    warm_up: tuple[tuple[int, int], ...] = ((1, 10), (1, 20), (1, 50), (2, 15))
    """Shapes (sequences, tokens) that an engine runs through before it accepts requests."""

    api_keys_file: PathText | None = None
    """File of API keys, one per line; clients must send one of them.
    The variable LAUNCHER_API_KEYS (separated by commas) adds to them, and must not be empty if it is set. Without any
    key anyone who can connect can use the server."""

    allowed_hosts: tuple[str, ...] = ()
    """Host names that a server without API keys accepts; ``*`` accepts all.
    ``localhost``, job.host and, unless it listens on this machine alone, IP addresses and the machine's name are always
    accepted. Other Host headers are rejected, because a web page could otherwise use the server through its reader's
    browser."""

    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of load balancers whose X-Forwarded-For header names the client.
    Without it, limits for each client address count all clients of a load balancer as one."""

    rate_per_minute: int | None = None
    """Requests per minute for each API key, or client address without keys; ``null``: no limit."""

    max_body_bytes: int | None = None
    """Largest request body, at most 16 MiB.
    ``null`` is 2 MiB, and 16 MiB for a model that takes images."""

    max_images: int = 8
    """Images that one request may have."""

    max_image_pixels: int = ImageLimits.max_pixels
    """Width times height of the largest image, read from its header before it is decoded."""

    max_image_bytes: int = 10 * 2**20
    """Size of the largest image file; in a request, base64 makes a third more of it."""

    image_hosts: tuple[str, ...] = ()
    """Hosts that images are fetched from; by default every address is refused.
    An entry is a name or an IPv4 address, with a port if it is not 80 or 443, as in ``10.0.0.5:8080``.
    Anyone who can use the server makes it send requests to these hosts."""

    image_workers: int = 1
    """Processes that decode and preprocess images."""

    image_cache_bytes: int = 256 * 2**20
    """Disk space of preprocessed images, kept by content in a temporary folder.
    Requests whose images find no room beside those in use get 429."""

    read_timeout_s: float = 30.0
    """How long the headers of a request, and then its body, may take to arrive."""

    max_connections: int = 2048
    """Connections that are open at the same time; further ones get 503 with Retry-After."""

    max_queue: int = 256
    """Sequences that may wait for an engine; further requests are refused with 429.
    One API key, or client address without keys, takes at most three quarters of the queue."""

    max_choices: int = 64
    """Sequences that one request may have: prompts times ``n``."""

    queue_timeout_s: float = 60.0
    """How long a request may wait before an engine begins it."""

    request_timeout_s: float = 600.0
    """How long a request may take as a whole."""

    stall_s: float = 30.0
    """Seconds without a step after which an engine with work makes the server not ready.
    After twice as long the engine is ended and restarted."""

    drain_s: float = 30.0
    """Seconds to finish accepted requests after SIGTERM; requests left then get an error."""

    result_cache_bytes: int = 64 * 2**20
    """Size of the cache for results of greedy and seeded requests; 0 disables it."""

    result_cache_ttl_s: float = 3600.0
    """How long a result is kept."""

    metrics_every_s: float = 5.0
    """Seconds between lines of metrics.jsonl."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject sizes and times that leave no server."""
        yield from super().validate()
        yield from self.validate_minimum(
            1, "replicas", "rate_per_minute", "max_connections", "max_queue", "max_choices"
        )
        yield from self.validate_minimum(1, "max_images", "max_image_pixels", "max_image_bytes", "image_workers")
        yield from self.validate_minimum(1024, "max_body_bytes")
        yield from self.validate_minimum(2**20, "image_cache_bytes")
        yield from self.validate_minimum(0, "result_cache_bytes", "drain_s")
        for name in (
            "read_timeout_s",
            "queue_timeout_s",
            "request_timeout_s",
            "stall_s",
            "result_cache_ttl_s",
            "metrics_every_s",
        ):
            if getattr(self, name) <= 0:
                yield self.error(name, "must be above 0", f"leave job.{name} out")
        yield from self._validate_image_bytes()
        for name in self.image_hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?", name):
                fix = "give names or addresses, with a port if need be: job.image_hosts=[images.example.org]"
                yield ConfigError("job.image_hosts", name, why="is not a host", fix=fix)
        if self.max_body_bytes is not None and self.max_body_bytes > _MAX_BODY_BYTES:
            why = f"is more than {_MAX_BODY_BYTES}: reading a larger body would delay other requests"
            yield self.error("max_body_bytes", why, f"set job.max_body_bytes={_MAX_BODY_BYTES} or less")
        for name in self.allowed_hosts:
            if not re.fullmatch(r"\*|[A-Za-z0-9._:-]+", name) or name.count(":") == 1:
                fix = "give only names or addresses: job.allowed_hosts=[models.example.org]"
                yield ConfigError("job.allowed_hosts", name, why="is not a host name", fix=fix)
        if self.allowed_hosts and self.api_keys_file is not None:
            why = "clients send keys (job.api_keys_file), so Host headers are not checked"
            yield self.error("allowed_hosts", why, "leave job.allowed_hosts out")
        yield from validate_port(self, default=8000)
        for at, network in enumerate(self.trusted_proxies):
            if not is_network(network):
                why = "is neither an address nor a network"
                fix = "write it like job.trusted_proxies=[10.0.0.5,10.1.0.0/16]"
                yield ConfigError(f"job.trusted_proxies[{at}]", network, why=why, fix=fix)
        for at, shape in enumerate(self.warm_up):
            if len(shape) != 2 or min(shape) < 1:
                why = "a shape is a number of sequences and a number of tokens, each at least 1"
                yield ConfigError(f"job.warm_up[{at}]", list(shape), why=why, fix="set job.warm_up=[[1,10]]")

    def _validate_image_bytes(self) -> Iterator[ConfigError]:
        """Reject a limit of images that no body can carry.

        By default the limit of bodies alone decides.
        """
        body_bytes = _MAX_BODY_BYTES if self.max_body_bytes is None else self.max_body_bytes
        base64_bytes = -(-self.max_image_bytes // 3) * 4
        if self.max_image_bytes != Serve.max_image_bytes and base64_bytes > body_bytes:
            why = f"in base64 it takes {base64_bytes:,} bytes, and a request body may have {body_bytes:,}"
            fix = f"set job.max_image_bytes={max(1, body_bytes // 4 * 3 - _AROUND_IMAGE_BYTES)} or less"
            yield self.error("max_image_bytes", why, fix)

    @property
    def num_replicas(self) -> int:
        """Return the replicas; each holds all weights."""
        return self.replicas

    @property
    def shutdown_grace_s(self) -> float:
        """The drain, and the time to stop after it."""
        return self.drain_s + _SHUTDOWN_SLACK_S

    @property
    def capacity(self) -> int:
        """Sequences that all engines work on at the same time."""
        at_once = {"continuous": self.max_num_seqs, "none": 1}.get(self.batching, self.max_batch_size)
        return self.replicas * at_once

    @property
    def address(self) -> str:
        """Where it is found from this machine."""
        return http_address(self.host, self.port)

    @property
    def image_limits(self) -> ImageLimits:
        """The largest image that is decoded."""
        return ImageLimits(max_pixels=self.max_image_pixels, max_bytes=self.max_image_bytes)

    def body_limit(self, run: Run) -> int:
        """Return the bytes of the largest request body."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        return _TEXT_BODY_BYTES if run.model.image_text() is None else _MAX_BODY_BYTES

    def unused_options(self, run: Run) -> Mapping[str, str]:
        """Add the limits of images for a model that takes text alone."""
        why = f"{run.model.name} takes text only"
        is_known = run.model.kind != "hf" or run.model.stored_config() is not None
        names = () if self.takes_images(run) or not is_known else _OF_IMAGES
        usual = {each.name: each.default for each in fields(self)}
        found = {name: why for name in names if getattr(self, name) != usual[name]}
        return {**found, **super().unused_options(run)}

    def takes_images(self, run: Run) -> bool:
        """Return whether requests may have images, as far as the files of the model are here."""
        found = run.model.image_text()
        return self.engine == "paged" and found is not None and found.processor is not None

    def name_of(self, run: Run) -> str:
        """Return the base model's name in clients' requests."""
        return self.served_model_name or run.model.name

    def max_ranks(self, run: Run) -> int:
        """Return the ranks of one engine: replicas are no ranks."""
        return run.parallel.dims(1).product if self.is_model_parallel(run) else 1

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return 0: it runs until a signal ends it."""
        return 0

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject ranks that would hold copies of the model, and replicas of what takes all ranks."""
        yield from super().validate_run(run, world_size=world_size)
        if world_size > 1 and not self.is_model_parallel(run):
            why = f"parallel={run.parallel.kind} makes an engine of 1 rank; job.replicas sets the number of engines"
            fix = f"set backend.ranks=1 job.replicas={world_size}"
            yield ConfigError("backend.ranks", world_size, why=why, fix=fix)
        if self.is_model_parallel(run) and self.replicas > 1:
            why = f"the {self.max_ranks(run)} ranks together are one engine"
            yield self.error("replicas", why, "set job.replicas=1, and start a second server for a second engine")
        if self.engine == "vllm" and (self.replicas > 1 or self.is_model_parallel(run)):
            why = "the launcher starts one vLLM server, which itself uses several GPUs"
            yield self.error("engine", why, "set job.replicas=1 parallel=single")
        yield from validate_warm_up(run, "job.warm_up", self.warm_up)
        shape = run.model.shape()
        if shape is not None and self.tokenizer == "bytes" and shape.vocab_size < 257:
            why = f"it has 257 tokens, and {run.model.name} has {shape.vocab_size} embedding rows"
            yield self.error("tokenizer", why, "set model.vocab_size=257 or more")

    def validate_machine(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield missing packages, a port in use, and unreadable keys."""
        yield from super().validate_machine(run, run_dir)
        yield from validate_packages(self)
        yield from validate_address(self)
        yield from validate_api_keys(self)

    def warnings(self, run: Run, *, world_size: int) -> Iterator[str]:
        """Warn of a server that other machines reach without keys."""
        yield from super().warnings(run, world_size=world_size)
        if not is_loopback(self.host) and self.api_keys_file is None:
            yield (
                f"no authentication: anyone who can connect to {self.address} can use the server, unless "
                "LAUNCHER_API_KEYS or job.api_keys_file is set"
            )

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the model, address, number of engines and batching."""
        yield "model", self.name_of(run)
        yield "address", self.address
        ranks = f" of {world_size} ranks" if world_size > 1 else ""
        yield "engines", f"{counted(self.replicas, 'replica')} of engine={self.engine}{ranks}"
        yield "batching", f"{self.batching}, {self.capacity} sequences at once, {self.max_queue} may wait"
        yield "tokenizer", self.describe_tokenizer(run)
        yield from self.describe_speculation(run)
        yield from self.describe_adapters()
        shapes = " ".join(f"{sequences}×{tokens}" for sequences, tokens in self.warm_up)
        yield "warm-up", shapes or "none"
        if self.takes_images(run):
            size = f"{self.max_image_pixels:,} pixels and {bytes_text(self.max_image_bytes)}"
            yield "images", f"at most {self.max_images} in a request, of {size} each"
        keys = self.api_keys_file or "those in LAUNCHER_API_KEYS, else no authentication"
        yield "keys", keys
        room = f"{bytes_text(self.result_cache_bytes)} for {self.result_cache_ttl_s:g} s"
        yield "results", f"kept in {room}" if self.result_cache_bytes else "not kept"
        yield "to end", f"SIGTERM or Ctrl-C; {self.drain_s:g} s to finish what was accepted"


_PACKAGES = ("fastapi", "httpx", "prometheus_client", "sse_starlette", "uvicorn")


def validate_packages(job: Serve) -> Iterator[ConfigError]:
    """Yield missing packages, in one line."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        why = f"it needs {', '.join(missing)}"
        yield ConfigError("job", job.kind, why=why, fix="pip install 'launcher[serve]'")


def validate_api_keys(job: Serve) -> Iterator[ConfigError]:
    """Yield a variable or a file of keys that holds no key or cannot be read."""
    yield from validate_api_keys_variable(os.environ)
    if API_KEYS_VARIABLE in os.environ and job.allowed_hosts:
        why = f"clients send keys ({API_KEYS_VARIABLE}), so Host headers are not checked"
        yield job.error("allowed_hosts", why, f"leave job.allowed_hosts out, or unset {API_KEYS_VARIABLE}")
    if job.api_keys_file is None:
        return
    try:
        api_keys_of_file(job.api_keys_file)
    except ConfigError as error:
        yield error
