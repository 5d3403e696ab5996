"""Named evaluation sets: texts whose loss a job measures beside that of the run's data."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from launcher.config.data.auto import AutoData
from launcher.config.data.base import Corpus
from launcher.config.data.shapes import Shape
from launcher.config.option_text import component_text
from launcher.config.paths import PathText
from launcher.config.run import BatchedJob, Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.utils.schema import to_tree

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_RESERVED = ("baseline", "callback", "lm_eval")

SET_METRICS = ("loss", "perplexity", "bits_per_byte")
"""What is recorded of each set, as ``eval/<set>/<name>``."""


@dataclass(frozen=True, kw_only=True)
class EvaluatingJob(BatchedJob):
    """A job that measures the loss of texts."""

    eval_sets: dict[str, tuple[PathText, ...] | PathText] | None = None
    """Further texts to evaluate, each by a name: ``{wiki: wiki.txt, code: [a.py, b.py]}``.
    A value is what ``data.path`` takes for the run's kind of data (``data.files`` with ``data=hf data.path=json``).
    Each is tokenised as the run's data; ``eval/<name>/loss``, ``perplexity`` and ``bits_per_byte`` are recorded."""

    @property
    def set_metrics(self) -> tuple[str, ...]:
        """Names of what is measured of the sets, without ``eval/``."""
        return tuple(f"{name}/{metric}" for name in self.eval_sets or {} for metric in SET_METRICS)

    def validate(self) -> Iterator[ConfigError]:
        """Reject names that no metric can have."""
        yield from super().validate()
        for name in self.eval_sets or {}:
            if not _NAME.fullmatch(name) or name in _RESERVED:
                why = f"the name {name!r} cannot be part of a metric's name"
                yield ConfigError("job.eval_sets", name, why=why, fix="use letters, digits, _ and -: wiki")

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject sets of made-up data."""
        yield from super().validate_run(run, world_size=world_size)
        if self.eval_sets and not isinstance(run.data, Corpus):
            why = f"data={run.data.kind} has no text, so that no other text has its tokens"
            yield ConfigError("job.eval_sets", _names(self.eval_sets), why=why, fix="set data=text, or leave it out")

    def validate_shapes(self, run: Run, data: AutoData, shapes: Collection[Shape]) -> Iterator[ConfigError]:
        """Add sets that have the name of a source of the data."""
        yield from super().validate_shapes(run, data, shapes)
        yield from self.validate_source_names(data, shapes)

    def validate_source_names(self, data: AutoData, shapes: Collection[Shape]) -> Iterator[ConfigError]:
        """Reject sets that have the name of a source, whose loss would have the same name."""
        names = data.held_out_source_names if data.separates_sources(shapes) else ()
        for name in sorted(set(names) & set(self.eval_sets or {})):
            why = f"a source of the data has this name, and its loss is recorded as eval/{name}/loss too"
            yield ConfigError(f"job.eval_sets.{name}", why=why, fix="choose another name for the set")

    def describe_shapes(self, run: Run, shapes: Collection[Shape]) -> Iterator[tuple[str, str]]:
        """Yield the metrics of the sources of a mixture, with names for plans.

        Args:
            run: of the job.
            shapes: of its rows.
        """
        data = run.data
        if not isinstance(data, AutoData) or not data.separates_sources(shapes or {"text"}):
            return
        train = [f"train/{name}/loss" for name in data.source_names("path")] if self.trains else []
        found = train + [f"eval/{name}/loss" for name in data.held_out_source_names]
        if found:
            yield "loss by source", ", ".join(found)

    def validate_machine(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield the errors of each set's files."""
        yield from super().validate_machine(run, run_dir)
        if not isinstance(run.data, Corpus):
            return
        for name, path in (self.eval_sets or {}).items():
            text: Corpus | None = None
            try:
                text = run.data.with_path(path)
                errors = list(text.validate_machine())
            except ConfigError as error:
                errors = list(getattr(error, "errors", (error,)))
            yield from (_of_set(error, name, run.data) for error in errors if error.option != "data.cache")
            if not errors and isinstance(text, AutoData) and text.holds_examples:
                yield examples_in_set(name, path)

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the sets."""
        yield from super().describe(run, world_size=world_size)
        for name, path in (self.eval_sets or {}).items():
            if isinstance(run.data, Corpus):
                shown = path if isinstance(path, str) else ", ".join(path)
                yield f"eval set {name}", f"{shown}: {self.eval_set_words}"

    @property
    def eval_set_words(self) -> str:
        """What is measured of each set, for the plan."""
        return "every token once"


def examples_in_set(name: str, path: str | tuple[str, ...]) -> ConfigError:
    """Return the error of a set of examples, such as chats: only text is cut into windows."""
    why = "holds examples, and windows are cut from text"
    return ConfigError(f"job.eval_sets.{name}", path, why=why, fix="give text, or set data.eval_path to the examples")


def _of_set(error: ConfigError, name: str, data: Corpus) -> ConfigError:
    """Return an error of a set's files under the option that names them."""
    option = f"job.eval_sets.{name}"
    fix = f"give files that {component_text(data)} reads" if "data=" in error.fix or "data." in error.fix else error.fix
    return ConfigError(option, error.value, why=error.why, fix=fix)


def _names(sets: Mapping[str, object]) -> object:
    return to_tree(list(sets))
