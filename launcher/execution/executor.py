"""The interface of every backend's executor; see ``launcher.backends.registry``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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


def _nothing() -> None:
    """Take no notice of the first step."""


AnyExecutor = Executor[Any]
