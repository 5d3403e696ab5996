"""The interface of every backend's executor; see ``launcher.backends.registry``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from launcher.config.backend.base import Backend
from launcher.protocol.outcome import RunOutcome
from launcher.protocol.plan import Host, Plan
from launcher.remote.command import RemoteCommand

B = TypeVar("B", bound=Backend)


class Executor(ABC, Generic[B]):
    """Renders and submits plans, with the options of one backend.

    Args:
        backend: its options.
        plugins: modules of the plugins that the run uses.
    """

    def __init__(self, backend: B, *, plugins: Sequence[str] = ()) -> None:
        self.backend, self.plugins = backend, tuple(plugins)
        self.on_first_step: Callable[[], object] = _nothing
        """Called once every rank has taken an optimizer step."""

    @abstractmethod
    def remote_command(self, host: Host, module: str) -> RemoteCommand:
        """Return the command that runs ``python -m module`` on ``host``.

        Its stdin and stdout are connected to this process.

        Raises:
            EnvironmentProblem: the host does not exist before the run starts.
        """

    def render(self, plan: Plan, *, snapshot: str) -> str:
        """Return the submission as text, beyond the commands of the plan itself.

        Args:
            plan: what to run.
            snapshot: the text of run.yaml.
        """
        return ""

    def check_submission(self, plan: Plan) -> None:
        """Raise if the cluster would reject the run, before the run directory is written.

        Raises:
            ConfigErrors: the cluster would reject the run.
            EnvironmentProblem: the cluster does not answer.
        """
        return

    @abstractmethod
    def submit(self, plan: Plan) -> RunOutcome:
        """Start ``plan``, wait until all of its processes have exited, and return the outcome.

        It writes no result files: ``submit_with_restarts`` does, after the last attempt.
        """


class ArrayExecutor(Executor[B]):
    """Executor of a cluster that queues many runs as one job array, each run a task of it."""

    @property
    def uses_arrays(self) -> bool:
        """Whether the runs of a sweep are queued so."""
        return True

    @abstractmethod
    def render_array(self, plan: Plan, *, folder: Path, tasks: Sequence[int]) -> str:
        """Return the submission of an array as text.

        Runs may be tasks of one array if their texts are equal for the same ``tasks``.

        Args:
            plan: of any of its runs.
            folder: the directory of the sweep.
            tasks: the numbers of its runs.
        """

    @abstractmethod
    def submit_array(self, plans: Mapping[int, Plan], *, folder: Path) -> str:
        """Queue one array and return its id.

        Args:
            plans: by the numbers of the tasks; their directories are staged.
            folder: the directory of the sweep.

        Raises:
            LauncherError: it is rejected; nothing was queued.
        """

    @abstractmethod
    def follow_arrays(self, arrays: Mapping[str, Mapping[int, Plan]]) -> dict[int, int]:
        """Wait until all tasks have ended, and return their exit codes by number.

        The first signal cancels the arrays.

        Args:
            arrays: the plans by number, by id of the array.
        """


def _nothing() -> None:
    """Take no notice of the first step."""


AnyExecutor = Executor[Any]
