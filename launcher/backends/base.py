"""What every backend has in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from launcher.component import Component
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.plan import Host, Identity, Plan
    from launcher.remote.command import Remote
    from launcher.supervise.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Backend(Component):
    """A way to start a plan and to stay with it until it ends."""

    group: ClassVar[str] = "backend"

    asks_hosts: ClassVar[bool] = False
    """Whether its hosts are other machines, to be examined before a start; a dry run knows only their names."""

    hands_over: ClassVar[bool] = False
    """Whether another process, started elsewhere, carries the run out and writes to its directory from then on."""

    restarts_itself: ClassVar[bool] = False
    """Whether a cluster sees to ``restarts``; whoever submits then does not."""

    shares_paths: ClassVar[bool] = True
    """Whether a path of an option means the same file on the hosts as on the machine that starts the run."""

    ranks: int | Literal["auto"] = "auto"
    """Ranks on each host; ``auto`` is what the hostfile says, else one per visible GPU, else 2 where there are two
    cores; never more than the job has work for."""

    agent: Literal["torchrun", "deepspeed"] = "torchrun"
    """Which launcher starts the ranks of one host."""

    port: int | Literal["auto"] = "auto"
    """Port of the rendezvous; ``auto`` finds a free one for each run and another if it is taken meanwhile."""

    threads: int | Literal["auto"] = "auto"
    """OMP_NUM_THREADS of each rank; ``auto`` shares the cores of the host among its ranks."""

    env: dict[str, str] = field(default_factory=dict)
    """Environment variables added to every rank."""

    show_ranks: tuple[int, ...] | Literal["all"] = "all"
    """Ranks whose output is shown; logs hold every rank's."""

    stall_timeout_s: float = 600.0
    """A rank that reports no progress for this long gets every stack dumped and ends the run; 0 waits for ever."""

    grace_s: float = 7.0
    """Time between asking the ranks to end (Ctrl-C, SIGTERM) and killing what is left."""

    preempt_grace_s: float = 60.0
    """The same after SIGUSR1, the schedulers' way to say: save what you need, you will continue later."""

    restarts: int = 0
    """Times a run that failed is started again from its newest checkpoint."""

    def sees_files_of_hosts(self, run_dir: str) -> bool:
        """Return whether this process sees the files that hosts see: it shares their paths, or runs on one of them."""
        return self.shares_paths or self.run_dir_on_hosts(run_dir) == run_dir

    def run_dir_on_hosts(self, run_dir: str) -> str:
        """Return where hosts keep a run that this machine keeps in ``run_dir``."""
        return run_dir

    @property
    def heartbeat_timeout_s(self) -> float:
        """Silence after which a host counts as lost; 0 where its end is always noticed."""
        return 0.0

    def forwards(self, environ: Mapping[str, str]) -> tuple[str, ...]:
        """Return the names of the variables in ``environ`` that hosts get; ranks of this machine inherit all."""
        return ()

    def problems(self) -> Iterator[ConfigError]:
        """Refuse counts and times that cannot be."""
        yield from self.below(1, "ranks", "threads")
        yield from self.below(0, "stall_timeout_s", "grace_s", "preempt_grace_s", "restarts")
        if self.port != "auto" and not 1024 <= self.port <= 65535:
            yield self.refuse("port", "must lie between 1024 and 65535", "set backend.port=auto")

    @abstractmethod
    def hosts(self, *, max_ranks: int | None) -> tuple[Host, ...]:
        """Return who takes part, in the order of ranks, without asking the network.

        Args:
            max_ranks: most ranks that the strategy can use, where it has a limit.

        Raises:
            ConfigErrors: the hosts cannot be told (a bad hostfile).
        """

    @abstractmethod
    def remote(self, host: Host, module: str) -> Remote:
        """Return the command that runs ``python -m module`` on ``host`` with its stdin and stdout on ours."""

    def fewest_hosts(self, begun: int) -> int:
        """Return with how few hosts a run that began on ``begun`` may be restarted."""
        return begun

    def refusals(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Yield what this backend cannot do on ``hosts``, by option."""
        yield from ()

    def rank_commands(self, hosts: Sequence[Host], identity: Identity) -> Sequence[tuple[str, ...]] | None:
        """Return the argv that becomes a rank on each host, where the backend starts ranks itself.

        ``None`` leaves it to ``backend.agent``.
        """
        return None

    def render(self, plan: Plan, *, snapshot: str) -> str:
        """Return the submission as text: what is started or applied beyond the commands of the plan itself.

        Args:
            plan: what to run.
            snapshot: the text of run.yaml.
        """
        return ""

    def validate_submission(self, plan: Plan) -> None:
        """Refuse what only the cluster can tell, before the run directory is written.

        Raises:
            ConfigErrors: the cluster would not take the run.
            EnvironmentProblem: the cluster cannot be asked.
        """
        return

    @abstractmethod
    def submit(self, plan: Plan) -> Outcome:
        """Start ``plan``, stay until nothing of it is left, and return how it ended.

        Writes nothing about the end: whoever tries again on another port, or gives up, calls ``conclude``.
        """
