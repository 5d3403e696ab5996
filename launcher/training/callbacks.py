"""Callbacks of plugins: called on every rank around steps, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigError
from launcher.plugins.base import CALLBACK
from launcher.plugins.calls import named_in_errors, plugin_name
from launcher.plugins.loading import declared_metrics, executor, metric_clash
from launcher.utils.text import did_you_mean

if TYPE_CHECKING:
    from launcher.engines.base import Engine, StepResult
    from launcher.engines.context import Context

NO_METRICS: Mapping[str, float] = {}
_OPTION = "job.callbacks"
_FILE = "callbacks.pt"
_HOOK_PREFIXES = ("on_", "before_", "after_")


class Callback:
    """Does nothing; a plugin overrides what it needs.

    All ranks call every method but ``on_exception`` together, so it may use collectives. Metrics that a method returns
    are written to metrics.jsonl beside the step, by rank 0; names begin with ``callback/`` there. An exception ends the
    run, and ``failure.json`` names the callback.

    A callback may read everything of ``context`` and ``engine``, and must not change the weights, the optimizer or the
    process group: a transform changes the model, a loss or an optimizer the training.

    Args:
        context: of this rank: run, run directory, rank.
        engine: the model and its optimizer. Under FSDP and ZeRO-3 a rank holds parts of the parameters;
            ``engine.weights()`` yields them whole.
    """

    def __init__(self, context: Context, engine: Engine) -> None:
        self.context, self.engine = context, engine

    def on_start(self, step: int) -> None:
        """Begin, once the checkpoint is loaded and before the first step; ``step`` steps are done."""

    def before_step(self, step: int) -> None:
        """Prepare optimizer step ``step`` (1 is the first); there are no gradients yet."""

    def on_step(self, step: int, result: StepResult) -> Mapping[str, float]:
        """Return metrics after optimizer step ``step``; the gradients are freed.

        ``result`` is the same on every rank.
        """
        return NO_METRICS

    def on_evaluate(self, step: int, loss: float) -> Mapping[str, float]:
        """Return metrics after an evaluation; ``loss`` is held-out, in nats a token."""
        return NO_METRICS

    def on_save(self, step: int, folder: Path) -> Mapping[str, float]:
        """Return metrics after a checkpoint was written to ``folder``, whole; do not change it."""
        return NO_METRICS

    def on_end(self, step: int) -> Mapping[str, float]:
        """Return metrics after the last step, evaluation and checkpoint of this process.

        ``step`` is below ``job.steps`` where the run was preempted: the time left is short.
        """
        return NO_METRICS

    def on_exception(self, error: Exception) -> None:
        """Clean up after the exception that ends training on this rank.

        Other ranks may work on or be gone: no collectives. ``on_end`` is not called.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, tensors and plain values; rank 0 saves its own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned; called before ``on_start``, with a state only."""


class Callbacks:
    """Those that a run names, called in their order.

    Args:
        names: of ``job.callbacks``.
        context: of this rank.
        engine: of this rank.

    Raises:
        JobError: one is no ``Callback``, or has a method that is never called.
        PluginError: the class of one raised an exception.
    """

    def __init__(self, names: Iterable[str], context: Context, engine: Engine) -> None:
        self._all: dict[str, Callback] = {}
        self._recorded_by: dict[str, str] = {}
        for name in names:
            with named_in_errors(CALLBACK, name):
                cls = executor(CALLBACK, name, {})
                _check_class(name, cls)
                self._all[name] = cls(context, engine)

    def on_start(self, step: int) -> None:
        """Call that of all."""
        for name, each in self._all.items():
            with named_in_errors(CALLBACK, name, "on_start"):
                each.on_start(step)

    def before_step(self, step: int) -> None:
        """Call that of all."""
        for name, each in self._all.items():
            with named_in_errors(CALLBACK, name, "before_step"):
                each.before_step(step)

    def on_step(self, step: int, result: StepResult) -> Mapping[str, float]:
        """Return the metrics of all."""
        return dict(self._metrics("on_step", step, result))

    def on_evaluate(self, step: int, loss: float) -> Mapping[str, float]:
        """Return the metrics of all."""
        return dict(self._metrics("on_evaluate", step, loss))

    def on_save(self, step: int, folder: Path) -> Mapping[str, float]:
        """Return the metrics of all."""
        return dict(self._metrics("on_save", step, folder))

    def on_end(self, step: int) -> Mapping[str, float]:
        """Return the metrics of all."""
        return dict(self._metrics("on_end", step))

    def on_exception(self, error: Exception) -> None:
        """Call that of all; one that fails is printed, since ``error`` ends the run."""
        for name, each in self._all.items():
            try:
                each.on_exception(error)
            except Exception as another:  # noqa: BLE001 (a plugin's code fails in any way)
                what = f"{type(another).__name__}: {another}"
                print(f"{plugin_name(CALLBACK, name)}, on_exception: {what}", flush=True)

    def save(self, folder: Path, *, is_main: bool) -> None:
        """Write the states of all that have one into a checkpoint; every rank calls it.

        Raises:
            JobError: a state holds something other than tensors and plain values.
        """
        states = {}
        for name, each in self._all.items():
            with named_in_errors(CALLBACK, name, "state_dict"):
                if state := each.state_dict():
                    _check_state(name, state)
                    states[name] = state
        if states and is_main:
            import torch

            torch.save(states, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Give each callback the state that a checkpoint has of it; one without starts anew.

        Raises:
            JobError: the file is damaged.
        """
        file = folder / _FILE
        if not self._all or not file.exists():
            return
        from launcher.checkpoint.foreign.torch_pickle import load_torch_file

        for name, state in load_torch_file(file).items():
            if name in self._all:
                with named_in_errors(CALLBACK, name, "load_state_dict"):
                    self._all[name].load_state_dict(state)

    def _metrics(self, method: str, *arguments: Any) -> Iterator[tuple[str, float]]:
        """Call a method of all; yield what they return, under the names that metrics.jsonl has."""
        for name, each in self._all.items():
            with named_in_errors(CALLBACK, name, method):
                metrics = getattr(each, method)(*arguments)
                _check_metrics(name, metrics)
            for metric, value in (metrics or {}).items():
                if (first := self._recorded_by.setdefault(metric, name)) != name:
                    raise metric_clash(_OPTION, metric, first, name)
                yield f"callback/{metric}", float(value)


def _error(name: str, why: str, fix: str) -> ConfigError:
    return ConfigError(_OPTION, name, why=why, fix=fix)


def _check_class(name: str, cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Callback)):
        raise _error(name, f"{cls!r} is no class that derives from Callback", "derive it from Callback")
    for method in dir(cls):
        if method.startswith(_HOOK_PREFIXES) and not hasattr(Callback, method):
            known = [each for each in dir(Callback) if each.startswith(_HOOK_PREFIXES)]
            raise _error(name, f"{cls.__name__}.{method} is never called", did_you_mean(method, known))


def _check_metrics(name: str, metrics: Any) -> None:
    if metrics is None:
        return
    if not isinstance(metrics, Mapping):
        raise _error(name, f"returned {type(metrics).__name__}", "return names with numbers, or nothing")
    declared = declared_metrics(name)
    for metric, value in metrics.items():
        if not isinstance(metric, str) or not _is_number(value):
            why = f"returned {metric!r} with {type(value).__name__}"
            raise _error(name, why, "return text with a number, as tensor.item() gives one")
        if declared and metric not in declared:
            fix = f"add it to callback_metrics, which has {', '.join(declared)}"
            raise _error(name, f"records the metric {metric}, which its plugin does not declare", fix)


def _is_number(value: Any) -> bool:
    """Return whether it is a number, also of numpy, or a tensor of one."""
    try:
        return not isinstance(value, str) and isinstance(float(value), float)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a tensor of several numbers
        return False


def _check_state(name: str, state: Any, where: str = "state") -> None:
    """Raise if a state holds what a checkpoint, which runs no code, cannot give back."""
    import torch

    if type(state) is dict:
        for key, value in state.items():
            if not isinstance(key, str | int):
                raise _error(name, f"{where} has the key {key!r}", "use text as keys")
            _check_state(name, value, f"{where}[{key!r}]")
    elif where == "state":
        raise _error(name, f"state_dict returned {type(state).__name__}", "return a dict")
    elif type(state) in (list, tuple):
        for number, value in enumerate(state):
            _check_state(name, value, f"{where}[{number}]")
    elif state is not None and type(state) not in (bool, int, float, str, torch.Tensor):
        why = f"{where} is a {type(state).__name__}, which a checkpoint cannot give back"
        raise _error(name, why, "keep tensors and plain values only")
