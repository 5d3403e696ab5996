"""Benchmarks of inference in one process: batching, result cache, quantized decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.benchmark.serving import parse_length_distribution
from launcher.config.inference import BatchingMode, EngineLimits, validate_warm_up
from launcher.config.paths import PathText
from launcher.config.quantization import METHODS
from launcher.config.run import COMPUTING_GROUPS, LEARNING_GROUPS, Benchmark, Run
from launcher.errors import ConfigError

EXAMPLE_TEXTS = ("人工智能的发展趋势", "机器学习的未来", "深度学习的挑战", "自然语言处理的进展", "计算机视觉应用")
"""The five texts of the article's example."""


@dataclass(frozen=True, kw_only=True)
class BatchingBenchmark(Benchmark):
    """The run's model answers a queue that is there at once, in each batching mode in turn.

    The defaults are the article's.
    """

    kind: ClassVar[str] = "batching"
    used_groups: ClassVar[frozenset[str]] = COMPUTING_GROUPS - LEARNING_GROUPS
    summary_fields: ClassVar[tuple[str, ...]] = (
        "num_prompts",
        "input_len",
        "output_len",
        "max_batch_size",
        "max_wait_s",
    )
    isolation: ClassVar[str] = "each with an engine of its own"
    needs_model: ClassVar[bool] = True
    supports_quantized: ClassVar[bool] = True

    modes: tuple[BatchingMode, ...] = ("none", "static", "dynamic", "continuous")
    """Batching modes to compare, named as in job.batching."""

    num_prompts: int = 50
    """Requests in the queue."""

    input_len: str = "article"
    """Prompt tokens: 64, 16-256 or lognormal:48:0.8:256; ``article`` takes its five texts."""

    output_len: str = "32"
    """Tokens of each answer, in the same grammar; the model's end-of-sequence token ends none."""

    max_batch_size: int = 16
    """Requests in a batch; under ``continuous``, requests in progress at a time."""

    max_wait_s: float = 0.1
    """How long the first request of a batch waits for others."""

    bucket_size: int = 32
    """Under ``dynamic``, prompts whose lengths round up to the same multiple share a batch."""

    enable_prefix_caching: bool = False
    """Whether equal prefixes are computed once.
    Off by default: where texts repeat it would spare most of the work."""

    tokenizer: PathText = "model"
    """Tokenizer of the texts: ``model`` (its own), ``bytes`` (a token each) or a folder."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject an empty comparison and lengths that are none."""
        yield from super().validate()
        yield from self.validate_minimum(1, "num_prompts", "max_batch_size", "bucket_size")
        yield from self.validate_minimum(0, "max_wait_s")
        if not self.modes or len(set(self.modes)) < len(self.modes):
            yield self.error("modes", "is empty or has duplicates", "leave benchmark.modes out")
        for name in ("input_len", "output_len"):
            text = getattr(self, name)
            if (name, text) == ("input_len", "article"):
                continue
            try:
                parse_length_distribution(text)
            except ValueError as error:
                yield self.error(name, str(error), f"set benchmark.{name}=32")

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject requests that are longer than the model's longest sequence."""
        yield from super().validate_run(run, world_size=world_size)
        longest = parse_length_distribution(self.output_len).maximum
        if self.input_len == "article":  # a rank counts the tokens of its texts
            yield from run.model.validate_length(benchmark__output_len=longest, spare=1)
        else:
            prompt = parse_length_distribution(self.input_len).maximum
            yield from run.model.validate_length(benchmark__input_len=prompt, benchmark__output_len=longest)

    @property
    def num_measurements(self) -> int:
        """Each way in each round."""
        return self.repeats * len(self.modes)

    def limits(self, mode: BatchingMode) -> EngineLimits:
        """Return the limits of an engine."""
        return EngineLimits(
            batching=mode,
            max_num_seqs=self.max_batch_size,
            max_batch_size=self.max_batch_size,
            max_wait_s=self.max_wait_s,
            bucket_size=self.bucket_size,
            enable_prefix_caching=self.enable_prefix_caching,
        )

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the queue."""
        yield "model", f"{run.model.name}, weights={run.model.weights}, precision={run.precision.kind}"
        yield (
            "queue",
            f"{self.num_prompts} requests of {self.input_len}, answers of {self.output_len} tokens, all there at once",
        )
        yield "compared", ", ".join(self.modes)


EXAMPLE_PROMPTS = ("人工智能的发展", "机器学习的应用", "深度学习的未来", "人工智能的发展")


@dataclass(frozen=True, kw_only=True)
class ResultCacheBenchmark(Benchmark):
    """The model answers prompts in turn through ``job=serve``'s result cache.

    The defaults are the article's.
    """

    kind: ClassVar[str] = "cache"
    used_groups: ClassVar[frozenset[str]] = COMPUTING_GROUPS - LEARNING_GROUPS
    summary_fields: ClassVar[tuple[str, ...]] = ("max_length", "temperature", "top_k", "top_p", "no_repeat_ngram_size")
    isolation: ClassVar[str] = "all in one process, each with an empty cache"
    needs_model: ClassVar[bool] = True
    supports_quantized: ClassVar[bool] = True

    prompts: tuple[str, ...] = EXAMPLE_PROMPTS
    """One after the other."""

    max_length: int = 100
    """Tokens of prompt and answer together."""

    temperature: float = 0.7
    """Temperature of the answers, drawn with job.seed, so that they can be cached."""

    top_k: int = 50
    """Number of most likely tokens to sample from."""

    top_p: float = 0.95
    """Share of the probability that is kept."""

    no_repeat_ngram_size: int = 3
    """No so many tokens in a row occur twice."""

    max_bytes: int = 64 * 2**20
    """Room for results."""

    tokenizer: PathText = "model"
    """``model`` is the model's own, ``bytes`` has a token for each byte, else a folder."""

    warm_up: tuple[tuple[int, int], ...] = ((1, 10), (1, 20), (1, 50), (2, 15))
    """Shapes (sequences, tokens) that the engine runs through first."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a comparison of nothing."""
        yield from super().validate()
        yield from self.validate_minimum(2, "max_length")
        yield from self.validate_minimum(0, "temperature", "top_k", "no_repeat_ngram_size", "max_bytes")
        if not all(self.prompts) or not self.prompts:
            yield self.error("prompts", "a prompt must not be empty", "leave benchmark.prompts out")

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject lengths above the model's longest sequence."""
        yield from super().validate_run(run, world_size=world_size)
        yield from run.model.validate_length(benchmark__max_length=self.max_length)
        yield from validate_warm_up(run, "benchmark.warm_up", self.warm_up)

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the prompts."""
        yield "model", f"{run.model.name}, weights={run.model.weights}, precision={run.precision.kind}"
        yield "prompts", " · ".join(self.prompts)


DECODING_MODES = ("eager", "compiled", "blocks", "engine")
FORMATS = ("fp32", "bf16")
CTRANSLATE2 = "ctranslate2"

DEFAULT_CASES = (
    "fp32/eager",
    "bf16/eager",
    "fp32/compiled",
    "fp32/blocks",
    "int8_dynamic/eager",
    "int8_dynamic/blocks",
    "int8_weight/eager",
    "int8_weight/blocks",
    "fp32/engine",
    "bf16/engine",
    "int8_weight/engine",
    "int4_weight/engine",
    "nf4/eager",
)


@dataclass(frozen=True, kw_only=True)
class QuantizationBenchmark(Benchmark):
    """Greedy decoding of the run's model; the first way is what the others are compared with."""

    kind: ClassVar[str] = "quantization"
    used_groups: ClassVar[frozenset[str]] = COMPUTING_GROUPS - LEARNING_GROUPS
    summary_fields: ClassVar[tuple[str, ...]] = ("batch_size", "input_len", "output_len")
    needs_model: ClassVar[bool] = True

    cases: tuple[str, ...] = DEFAULT_CASES
    """Cases as WEIGHTS/HOW; weights are fp32, bf16 or a method of the group quantization.
    ``eager`` is plain forward passes with a growing cache, ``compiled`` has torch.compile and a static cache,
    ``blocks`` too but compiles one block for all, ``engine`` is the engine of job=serve."""

    batch_size: int = 1
    """Sequences at a time."""

    input_len: int = 64
    """Tokens that each begins with."""

    output_len: int = 32
    """Tokens that each is continued by, timed."""

    ctranslate2: str | None = None
    """Folder that CTranslate2's converter wrote; it is measured too."""

    ctranslate2_python: str | None = None
    """The interpreter of an environment that has CTranslate2."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject ways that are none, and a comparison of nothing."""
        yield from super().validate()
        yield from self.validate_minimum(1, "batch_size", "input_len", "output_len")
        known = [f"{weights}/{how}" for weights, how in itertools.product((*FORMATS, *METHODS), DECODING_MODES)]
        for way in self.cases:
            if way not in known:
                from launcher.utils.text import did_you_mean

                yield self.error("cases", f"{way} is not of the form WEIGHTS/HOW", did_you_mean(way, known))
        if not self.cases or len(set(self.cases)) < len(self.cases):
            yield self.error("cases", "is empty or has duplicates", "leave benchmark.cases out")
        if (self.ctranslate2 is None) != (self.ctranslate2_python is None):
            why = "CTranslate2 needs both a converted model and an interpreter that has it"
            yield self.error(
                "ctranslate2", why, "set benchmark.ctranslate2 and benchmark.ctranslate2_python, or neither"
            )

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield packages that are missing for one of the ways."""
        for method in sorted({way.partition("/")[0] for way in self.cases} & METHODS.keys()):
            for problem in METHODS[method]().validate_machine("benchmark.cases"):
                yield ConfigError("benchmark.cases", method, why=problem.why, fix=problem.fix.split(",")[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The ways, the peer's among them."""
        return (*self.cases, f"int8/{CTRANSLATE2}") if self.ctranslate2 else self.cases

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject sequences that are longer than the model's longest."""
        yield from super().validate_run(run, world_size=world_size)
        yield from run.model.validate_length(
            benchmark__input_len=self.input_len, benchmark__output_len=self.output_len, spare=1
        )

    @property
    def num_measurements(self) -> int:
        """Each way in each round."""
        return self.repeats * len(self.names)

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the ways."""
        yield "model", f"{run.model.name}, weights={run.model.weights}; what is not quantized: {run.precision.kind}"
        yield "compared", ", ".join(self.names)
