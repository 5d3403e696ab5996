"""What the life of a run needs of a backend; ``launcher.backends.registry`` has one executor for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from launcher.config.backend.base import Backend
from launcher.protocol.outcome import RunOutcome
from launcher.protocol.plan import Host, Plan
from launcher.remote.command import RemoteCommand

B = TypeVar("B", bound=Backend)


class Executor(ABC, Generic[B]):
    """Shows and starts plans as the options of one backend say.

    Args:
        backend: its options.
    """

    def __init__(self, backend: B) -> None:
        self.backend = backend

    @abstractmethod
    def remote_command(self, host: Host, module: str) -> RemoteCommand:
        """Return the command that runs ``python -m module`` on ``host``, connected to this process by stdin and stdout.

        Raises:
            EnvironmentProblem: the host does not exist before the run starts.
        """

    def render(self, plan: Plan, *, snapshot: str) -> str:
        """Return the submission as text: what is started or applied beyond the commands of the plan itself.

        Args:
            plan: what to run.
            snapshot: the text of run.yaml.
        """
        return ""

    def check_submission(self, plan: Plan) -> None:
        """Check what only the cluster knows, before the run directory is written.

        Raises:
            ConfigErrors: the cluster would reject the run.
            EnvironmentProblem: the cluster does not answer.
        """
        return

    @abstractmethod
    def submit(self, plan: Plan) -> RunOutcome:
        """Start ``plan``, wait until all of its processes have ended, and return how it ended.

        It does not write how the run ended: ``submit_with_restarts`` does, after the last attempt.
        """


AnyExecutor = Executor[Any]
