"""Job generate: continue a file of prompts, one answer a line, in the order of the input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from launcher.config.data.formats import BadFile
from launcher.config.job.generating import GeneratingJob
from launcher.config.paths import PathText
from launcher.config.prompt_file import SAMPLE_PROMPTS, BadLine, PromptFile, check_fields, open_prompt_file
from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_object, write_json
from launcher.utils.schema import to_tree
from launcher.utils.text import did_you_mean

SAMPLE_INPUT = "sample"
_LINE_OPTIONS = (
    *("max_tokens", "stop", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "no_repeat_ngram_size", "num_beams"),
)
"""Options that are fields of a line, too."""
_LINES_CHECKED = 1000
"""If all of the first so many lines are bad, nothing is started."""

_IRRELEVANT_OPTIONS = frozenset(
    (
        *("input", "output", "batching", "max_num_seqs", "kv_cache_tokens", "prefill_chunk_size"),
        *("enable_prefix_caching", "max_batch_size", "max_wait_s", "bucket_size", "aging_s", "echo_step_s"),
        *("speculation", "speculation_layers", "speculation_tokens", "speculation_adaptive", "sparse_kernels"),
    )
)
"""Options of the job that no answer depends on."""
CLAIM_FILE = "output"
"""File in the folder of parts that names the file of answers, written before that is."""


@dataclass(frozen=True, kw_only=True)
class Generate(GeneratingJob):
    """Generate answers to a file of prompts.

    Every rank has the model and processes its share of the lines, or all ranks hold one model together.

    Fields of a line take precedence over the options here.
    """

    kind: ClassVar[str] = "generate"
    handles_preemption: ClassVar[bool] = True
    reads_other_ranks_files: ClassVar[bool] = True

    input: PathText = SAMPLE_INPUT
    """File of prompts; ``sample`` is a file of 16 prompts that comes with the program.
    A line has ``prompt`` (text or token ids) or ``messages`` (a chat), and optionally ``id``, ``stop`` and sampling
    parameters of its own."""

    format: Literal["auto", "jsonl", "json", "csv", "text"] = "auto"
    """``jsonl``, ``json`` (a list), ``csv`` (a header), ``text`` (lines) or ``auto``.
    ``auto`` detects it by content and suffix. The file may be compressed (gzip, bz2, xz, zstd)."""

    output: PathText | None = None
    """Output file, JSON lines; ``null`` is generated.jsonl in the run directory.
    An existing file is never overwritten."""

    adapter: str | None = None
    """Adapter (of job.adapters) for lines without ``model``; ``null`` is the base model."""

    max_tokens: int = 128
    """Tokens of an answer at most."""

    stop: tuple[str, ...] = ()
    """Strings that end an answer; they are not part of it."""

    temperature: float = 0.0
    """0 takes the most likely token."""

    top_k: int = 0
    """Draw from this many of the most likely tokens; 0 draws from all."""

    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities add up to this."""

    min_p: float = 0.0
    """Draw from tokens at least this times as likely as the most likely one."""

    repetition_penalty: float = 1.0
    """Divide scores of tokens that are in prompt or answer by this."""

    no_repeat_ngram_size: int = 0
    """No sequence of this many tokens occurs twice; 0 allows all."""

    num_beams: int = 1
    """Sequences that beam search keeps; 1 is no beam search."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject invalid sampling parameters, and suffixes from which no format follows."""
        from launcher.config.sampling import SamplingParams, validate_sampling, validate_stop_strings

        yield from super().validate()
        sampling = {name: value for name, value in self.default_fields.items() if name not in ("stop", "model")}
        for name, why, better in validate_sampling(SamplingParams(**sampling)):
            yield self.error(name, why, f"set job.{name}={better:g}")
        if why := validate_stop_strings(self.stop):
            yield self.error("stop", why, "give fewer or shorter ones")
        if "" in self.stop:
            yield self.error("stop", "an empty text would end every answer", "leave it out")

    @property
    def default_fields(self) -> dict[str, Any]:
        """Values of the fields that a line does not set."""
        return {name: getattr(self, name) for name in _LINE_OPTIONS} | {"model": self.adapter}

    def models(self, run: Run) -> dict[str, str]:
        """Return the adapter of each name that a line may choose; empty is the base model."""
        return {self.name_of(run): "", **{name: name for name in self.adapters}}

    @property
    def max_concurrent(self) -> int:
        """Requests that an engine processes at the same time."""
        return {"continuous": self.max_num_seqs, "none": 1}.get(self.batching, self.max_batch_size)

    @property
    def has_own_input(self) -> bool:
        """Whether the prompts are a file of the user's, not the shipped one."""
        return self.input != SAMPLE_INPUT

    def source(self) -> PromptFile:
        """Return the input.

        Raises:
            ConfigError: it holds no prompts.
        """
        if not self.has_own_input:
            return open_prompt_file(SAMPLE_PROMPTS)
        try:
            return open_prompt_file(Path(self.input).expanduser(), self.format)
        except BadFile as bad:
            raise self.error("input", bad.why, bad.fix) from bad

    def output_path(self, run_dir: RunDir) -> Path:
        """Return the file of answers."""
        return Path(self.output).expanduser() if self.output else run_dir.path / "generated.jsonl"

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return 0: the ranks count the lines when they read the file."""
        return 0

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject several ranks with a vLLM each."""
        yield from super().validate_run(run, world_size=world_size)
        if self.adapter is not None and self.adapter not in self.adapters:
            why = "is not a name in job.adapters"
            fix = (
                did_you_mean(self.adapter, self.adapters)
                if self.adapters
                else f"add job.adapters.{self.adapter}=FOLDER"
            )
            yield self.error("adapter", why, fix)
        if self.engine == "vllm" and world_size > 1:
            why = "the launcher starts one vLLM server, which itself uses several GPUs"
            yield ConfigError("backend.ranks", world_size, why=why, fix="set backend.ranks=1")

    def max_ranks(self, run: Run) -> int | None:
        """Return the ranks of a model-parallel engine, else those of the strategy; 1 for vLLM."""
        if self.engine == "vllm":
            return 1
        return run.parallel.dims(1).product if self.is_model_parallel(run) else super().max_ranks(run)

    def validate_machine(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield missing or existing files, and a run directory that holds answers to another task."""
        yield from super().validate_machine(run, run_dir)
        output = self.output_path(run_dir)
        if self.input != SAMPLE_INPUT and not Path(self.input).expanduser().is_file():
            yield self._missing_error()
            return
        try:
            source = self.source()
            yield from self.validate_lines(source)
        except ConfigError as error:
            yield error
            return
        if self.output is not None and self.output.endswith("/"):
            yield self.error("output", "names a folder", f"name a file: job.output={self.output}answers.jsonl")
        elif run_dir.reserves(output):
            fix = "name a file outside the run directory, or leave it out"
            yield self.error("output", f"belongs to the run itself, whose directory is {run_dir.path}", fix)
            return
        elif not output.parent.is_dir() and self.output is not None:
            yield self.error("output", f"there is no folder {output.parent}", "create it, or choose another")
        try:
            stored = stored_fingerprint(run_dir.generated)
        except ConfigError as error:
            yield error
            return
        if stored is not None:
            yield from fingerprint_of(run, self, source, digest=source.digest()).validate_stored(stored, self)
        if output.exists() and not owns_output(run_dir.generated, output):
            yield ConfigError("job.output", output, why="already exists", fix="choose another, or move it")

    def _missing_error(self) -> ConfigError:
        if Path(self.input).expanduser().is_dir():
            return self.error("input", "is a folder", "give one file of prompts: cat FOLDER/*.jsonl > prompts.jsonl")
        return self.error("input", "there is no such file", "give a file of prompts, or job.input=sample")

    def validate_lines(self, source: PromptFile) -> Iterator[ConfigError]:
        """Yield why no line at the beginning can be answered, if that is so."""
        first, tried = "", 0
        try:
            for record in itertools.islice(source.records(lambda number: True), _LINES_CHECKED):
                tried += 1
                try:
                    check_fields(record)
                except BadLine as bad:
                    first = first or f"line {record.line:,}: {bad}"
                else:
                    return
        except BadFile as bad:
            yield self.error("input", bad.why, bad.fix)
            return
        why = f"{first} ({'its only line' if tried == 1 else f'all {tried:,} lines that were read are bad'})"
        yield self.error("input", why, "a line needs prompt or messages; job.format=text takes each line as a prompt")

    def warnings(self, run: Run, *, world_size: int) -> Iterator[str]:
        """Add choices among tokens that greedy answers do not make."""
        yield from super().warnings(run, world_size=world_size)
        usual = {field.name: field.default for field in fields(self)}
        chosen = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) != usual[name]]
        if chosen and self.temperature == 0:
            named = " ".join(f"job.{name}={getattr(self, name):g}" for name in chosen)
            yield f"{named}: job.temperature=0 takes the most likely token: set job.temperature=1 to draw from several"

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield from where to where, and how requests are put together."""
        try:
            yield "input", f"{self.input} ({self.source().format})"
        except ConfigError:  # which validate_machine reports
            yield "input", self.input
        yield "output", self.output or "generated.jsonl"
        several = "of all" if self.is_model_parallel(run) else "on each of"
        yield "engines", f"engine={self.engine} {several} {world_size} ranks" if world_size > 1 else self.engine
        yield "batching", f"{self.batching}, {self.max_concurrent} sequences at once"
        yield "tokenizer", self.describe_tokenizer(run)
        yield from self.describe_speculation(run)
        yield from self.describe_adapters()

    def files(self) -> Iterator[str]:
        """Yield the answers, unless they go elsewhere, and where they are until all are there."""
        if self.output is None:
            yield "generated.jsonl"
        yield "generated/ (until all lines are done)"


@dataclass(frozen=True, kw_only=True)
class BatchFingerprint:
    """Kept in the run directory from the first start on."""

    digest: str
    """SHA-256 of the input file."""
    options: Mapping[str, Any]
    """All that answers depend on, by option."""

    def validate_stored(self, stored: BatchFingerprint, job: Generate) -> Iterator[ConfigError]:
        """Yield what keeps this task from continuing a stored one."""
        if self.digest != stored.digest:
            why = "is not the file whose answers are in this run directory"
            yield job.error("input", why, "give the same file, or start a new run")
        for option in sorted(self.options.keys() | stored.options.keys()):
            now, then = self.options.get(option), stored.options.get(option)
            if now != then:
                why = f"the existing answers were generated with {then}"
                yield ConfigError(option, now, why=why, fix=f"set {option}={then}, or start a new run")


def fingerprint_of(run: Run, job: Generate, source: PromptFile, *, digest: str) -> BatchFingerprint:
    """Return the task of a run."""
    tree = {f"job.{name}": value for name, value in to_tree(job).items() if name not in _IRRELEVANT_OPTIONS}
    tree["job.format"] = source.format
    for group in ("model", "precision", *(["data"] if job.tokenizer == "data" else [])):
        tree |= {f"{group}.{name}": value for name, value in to_tree(getattr(run, group)).items()}
    return BatchFingerprint(digest=digest, options=tree)


def stored_fingerprint(folder: Path) -> BatchFingerprint | None:
    """Return the fingerprint that a folder of parts was started with, if it was.

    Raises:
        ConfigError: it is damaged, so nothing says which task the answers belong to.
    """
    file = folder / "task.json"
    try:
        tree = read_object(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        tree = {}
    digest, options = tree.get("digest"), tree.get("options")
    if not isinstance(digest, str) or not isinstance(options, dict):
        why, fix = f"{file} is damaged, so it is unknown to which prompts its answers belong", "choose a new directory"
        raise ConfigError("run.dir", folder.parent, why=why, fix=fix)
    return BatchFingerprint(digest=digest, options=options)


def store_fingerprint(folder: Path, task: BatchFingerprint) -> None:
    """Write it down; every rank may, for all write the same."""
    write_json(folder / "task.json", to_tree(task))


def owns_output(folder: Path, output: Path) -> bool:
    """Whether a file of answers was started by the run with this folder of parts."""
    claim = folder / CLAIM_FILE
    return claim.is_file() and claim.read_text(encoding="utf-8") == str(output.absolute())
