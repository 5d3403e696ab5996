"""Benchmark of a server under load, and the values that describe a load."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from launcher.config.paths import PathText
from launcher.config.run import COMPUTING_GROUPS, LEARNING_GROUPS, Benchmark, Run
from launcher.errors import ConfigError

LENGTHS_GRAMMAR = "64, 16-256 (even over that range), or lognormal:96:0.8:1024 (median, sigma, most)"
_NUMBER, _RANGE = re.compile(r"\d+"), re.compile(r"(\d+)-(\d+)")
_LOGNORMAL = re.compile(r"lognormal:(\d+):(\d*\.?\d+):(\d+)")


@dataclass(frozen=True, kw_only=True)
class LengthDistribution:
    """A distribution of whole numbers from ``minimum`` to ``maximum``."""

    minimum: int
    maximum: int
    median: float | None = None
    """Median of the log-normal distribution; ``None`` is a uniform one."""
    sigma: float = 0.0

    def draw(self, random_: random.Random) -> int:
        """Return one length."""
        if self.median is None:
            return random_.randint(self.minimum, self.maximum)
        drawn = random_.lognormvariate(math.log(self.median), self.sigma)
        return min(self.maximum, max(self.minimum, round(drawn)))


def parse_length_distribution(text: str) -> LengthDistribution:
    """Return the distribution that ``text`` writes.

    Raises:
        ValueError: it is not of the grammar, or no length is left; the message says so.
    """
    if _NUMBER.fullmatch(text):
        found = LengthDistribution(minimum=int(text), maximum=int(text))
    elif match := _RANGE.fullmatch(text):
        found = LengthDistribution(minimum=int(match[1]), maximum=int(match[2]))
    elif match := _LOGNORMAL.fullmatch(text):
        found = LengthDistribution(minimum=1, maximum=int(match[3]), median=float(match[1]), sigma=float(match[2]))
    else:
        raise ValueError(f"is not a distribution of lengths ({LENGTHS_GRAMMAR})")
    if not 1 <= found.minimum <= found.maximum or found.median == 0:
        raise ValueError("is an empty range: lengths begin at 1, and the second is not below the first")
    return found


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request."""

    fields: dict[str, Any]
    """``prompt`` or ``messages``, ``max_tokens``, and whatever else goes into its body."""
    at_s: float = 0.0
    """When it is due, in seconds after the start; only where calls come at given times."""


def read_trace(path: Path) -> list[LoadRequest]:
    """Return the requests of a trace file: JSON lines of a body's fields and optional ``at_s``.

    Raises:
        ValueError: a line is no such object; the message names its number.
        OSError: the file cannot be read.
    """
    calls = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                calls.append(_parse_trace_line(number, line))
    if not calls:
        raise ValueError("is empty")
    return calls


def _parse_trace_line(number: int, line: str) -> LoadRequest:
    try:
        fields = json.loads(line)
        at_s = float(fields.pop("at_s", 0.0))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"line {number} is not a request: {error}") from error
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise ValueError(f"line {number} needs prompt or messages")
    return LoadRequest(fields, at_s)


@dataclass(frozen=True, kw_only=True)
class ServerAddress:
    """Where a server is: ``http://host:port/prefix``."""

    host: str
    port: int
    prefix: str

    @property
    def base(self) -> str:
        """The address as one writes it."""
        return f"http://{self.host}:{self.port}{self.prefix}"


def parse_server_address(url: str) -> ServerAddress:
    """Return the address in ``url``.

    Raises:
        ValueError: it is none, or asks for encryption, which this client lacks.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("has a login, and run.yaml is written to disk: a server takes keys, of api_key_variable")
    if parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("is not an address like http://127.0.0.1:8000 (without TLS)")
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return ServerAddress(host=parts.hostname, port=parts.port or 80, prefix=prefix)


@dataclass(frozen=True, kw_only=True)
class ServingBenchmark(Benchmark):
    """Load on an OpenAI-compatible server: a running one, or one started with the run's model."""

    kind: ClassVar[str] = "serving"
    summary_fields: ClassVar[tuple[str, ...]] = ("input_len", "output_len", "duration_s")
    isolation: ClassVar[str] = "all levels in turn, on one server"
    supports_quantized: ClassVar[bool] = True

    repeats: int = 1
    """Rounds; each runs all levels with prompts of its own, so no prompt cache helps."""

    base_url: str | None = None
    """Address of the server (``http://127.0.0.1:8000``); ``null`` starts one for the run."""

    served_model_name: str | None = None
    """Model name in requests; ``null`` takes the first that the server lists."""

    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key, where the server wants one."""

    serve: dict[str, Any] = field(default_factory=dict)
    """job=serve options of the server started here: ``{batching: dynamic, max_num_seqs: 16}``."""

    max_concurrency: tuple[int, ...] = (1, 4, 8, 16)
    """Closed loop: requests in flight, one load level each.
    A request that completes is followed by the next."""

    request_rate: tuple[float, ...] = ()
    """Open loop instead: requests a second, one load level each.
    Arrivals are a Poisson process, and latencies count from the time at which a request was due, so that a server that
    stalls cannot hide it (coordinated omission)."""

    duration_s: float = 30.0
    """Length of each level; requests in flight at its end are cancelled."""

    trace: PathText | None = None
    """File of requests, JSON lines; ``null`` draws words from ``job.seed``.
    A line holds fields of the body (``prompt`` or ``messages``, ``max_tokens``, …); after the last line the file starts
    over."""

    input_len: str = "16-256"
    """Words of a prompt (about a token each): 64, 16-256, or lognormal:96:0.8:1024.
    A log-normal distribution has its median, sigma and maximum."""

    output_len: str = "16-128"
    """``max_tokens``, in the same grammar."""

    extra_body: dict[str, Any] = field(default_factory=dict)
    """Fields that every body gets: ``{ignore_eos: true}`` where a server knows it."""

    slo_ttft_s: float | None = 2.0
    """Goodput counts answers with at most this time to first token (TTFT); ``null``: no limit."""

    slo_tpot_s: float | None = 0.2
    """The same for the mean time per output token after the first (TPOT)."""

    slo_e2el_s: float | None = None
    """The same for the end-to-end latency (E2EL)."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject addresses, lengths and levels that are none."""
        yield from super().validate()
        for name, parse in (
            ("input_len", parse_length_distribution),
            ("output_len", parse_length_distribution),
            ("base_url", parse_server_address),
        ):
            text = getattr(self, name)
            try:
                if text is not None:
                    parse(text)
            except ValueError as error:
                yield self.error(name, str(error), f"leave benchmark.{name} out, or write it in this form")
        if self.duration_s <= 0:
            yield self.error("duration_s", "must be above 0", "set benchmark.duration_s=30")
        for name, fix in (("max_concurrency", "[1,4,8,16]"), ("request_rate", "[0.5,1,2]")):
            levels = getattr(self, name)
            if min(levels, default=1) <= 0 or len(set(levels)) < len(levels):
                yield self.error(name, "needs distinct numbers above 0", f"set benchmark.{name}={fix}")
        if not self.levels:
            yield self.error("max_concurrency", "is empty", "leave benchmark.max_concurrency out")
        if self.base_url is not None and self.serve:
            yield self.error(
                "serve",
                "applies to a server that the benchmark starts",
                "leave benchmark.serve or benchmark.base_url out",
            )

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject requests longer than the server started here takes, at a token a word."""
        yield from super().validate_run(run, world_size=world_size)
        if self.base_url is None and self.trace is None:
            inputs, outputs = (parse_length_distribution(text).maximum for text in (self.input_len, self.output_len))
            yield from run.model.validate_length(benchmark__input_len=inputs, benchmark__output_len=outputs)

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield a trace that cannot be read."""
        if self.trace is not None:
            try:
                read_trace(Path(self.trace).expanduser())
            except (OSError, ValueError) as error:
                yield self.error("trace", str(error), "correct it, or leave benchmark.trace out")

    @property
    def used_groups(self) -> frozenset[str]:  # type: ignore[override]
        """Those of the server that it starts for itself."""
        return COMPUTING_GROUPS - LEARNING_GROUPS if self.needs_model else frozenset()

    @property
    def needs_model(self) -> bool:  # type: ignore[override]
        """Whether it starts a server."""
        return self.base_url is None

    @property
    def server_options(self) -> Mapping[str, Any] | None:
        """Options of the job=serve that it starts, if it does."""
        return self.serve if self.base_url is None else None

    @property
    def num_measurements(self) -> int:
        """Each level in each round."""
        return self.repeats * len(self.levels)

    @property
    def is_open_loop(self) -> bool:
        """Whether requests are sent at a rate, whether or not others have completed."""
        return bool(self.request_rate)

    @property
    def levels(self) -> tuple[float, ...]:
        """Levels of load, in the order in which they are measured."""
        return self.request_rate or self.max_concurrency

    def name_of(self, level: float) -> str:
        """Return the name of a level in results and metrics."""
        return f"{'request_rate' if self.is_open_loop else 'max_concurrency'}={level:g}"

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the server and the load."""
        own = f"job=serve with {run.model.name}, weights={run.model.weights}, precision={run.precision.kind}"
        yield "server", self.base_url or own
        yield "requests", self.trace or f"{self.input_len} words, {self.output_len} tokens"
        yield "load", f"{', '.join(map(self.name_of, self.levels))}; {self.duration_s:g} s each"
