"""The first pod of a run: plan, wait for the agents of the other pods, run the session."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from launcher.backends.kubernetes.manifests import job_reference
from launcher.backends.kubernetes.pod_config import PodConfig, pod_address
from launcher.backends.kubernetes.run_store import RunStore
from launcher.config.backend.kubernetes import KubernetesBackend
from launcher.config.run import Run
from launcher.errors import EXIT_PREEMPTED, ConfigError, ConfigErrors
from launcher.execution.executor import Executor
from launcher.execution.lifecycle import execute_run
from launcher.execution.prepare import PreparedRun, replan
from launcher.execution.validate import validate_run_dir
from launcher.protocol.outcome import RunOutcome
from launcher.protocol.plan import Host, HostPlan, Plan
from launcher.protocol.rundir import RunDir
from launcher.remote.command import RemoteCommand
from launcher.runs.lock import RunLock
from launcher.supervision.connection import AgentConnection, PipeConnection
from launcher.supervision.session import num_session_files, run_session
from launcher.supervision.tcp_connection import MAX_PENDING, AgentListener, Say, TcpConnection
from launcher.utils.files import read_json
from launcher.utils.system import raise_open_file_limit

_NOT_STORED = 1
"""Exit code of a completed run whose directory could not be copied to ``backend.store``."""


def run_leader(run: Run, backend: KubernetesBackend, config: PodConfig, *, key: bytes, say: Say) -> int:
    """Run the session and return the exit code for the pod's controller.

    Args:
        run: as it was submitted.
        backend: the options of the cluster.
        config: the pod config that was submitted with it.
        key: shared with the other pods.
        say: prints a line.

    Raises:
        ConfigError: the run cannot work here.
        EnvironmentProblem: the other pods did not connect, or the object store cannot be used.
    """
    store = RunStore(backend.store, RunDir(Path(config.identity.run_dir)), say=say) if backend.store else None
    if store is not None and (num_files := store.restore()):
        say(f"{num_files} files of the run are restored from {backend.store}")
    prepared = prepare_in_cluster(run, backend, config)
    run_dir = prepared.directory
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    try:
        lock = RunLock(run_dir.path).acquire()
    except ConfigError as problem:  # the pod before this one is still ending, or its node is out of reach
        say(str(problem))
        return EXIT_PREEMPTED
    executor = PodExecutor(backend, config, key=key, say=say)
    with lock, store or nullcontext():
        # no retry on another port: the agents of the other pods would have to connect again
        outcome = execute_run(prepared, executor, port_tries=1, prints_summary=False)
    code = _code_for_controller(outcome, executor.agents)
    return code if store is None or not store.problem else code or _NOT_STORED


class PodExecutor(Executor[KubernetesBackend]):
    """Runs the session in the first pod, with the agents of the other pods, which connect to it.

    Args:
        backend: the options of the cluster.
        config: what else was submitted.
        key: with which the other pods prove that they belong to the run.
        say: prints a line.
    """

    def __init__(self, backend: KubernetesBackend, config: PodConfig, *, key: bytes, say: Say) -> None:
        super().__init__(backend)
        self._config, self._key, self._say = config, key, say
        self.agents: Mapping[str, TcpConnection] = {}
        """Connections to the agents of the other pods, by host."""

    def remote_command(self, host: Host, module: str) -> RemoteCommand:
        """Return the command that runs ``module`` in this pod; others cannot be reached."""
        return RemoteCommand(argv=(sys.executable, "-m", module))

    def submit(self, plan: Plan) -> RunOutcome:
        """Wait for the agents of the other pods and run the session.

        Raises:
            EnvironmentProblem: the other pods did not connect.
        """
        run_dir = RunDir(Path(plan.run_dir))
        others = {number: host.host.name for number, host in enumerate(plan.hosts) if number}

        def connect(host: HostPlan) -> AgentConnection:
            name = host.host.name
            if name in self.agents:
                return self.agents[name]
            remote = self.remote_command(host.host, "launcher.supervision.agent_entry")
            return PipeConnection(name, remote, log=run_dir.log_of(name, "agent"))

        with raise_open_file_limit(num_session_files(plan) + MAX_PENDING):
            listener = AgentListener(port=self._config.session_port, key=self._key, hosts=others)
            self.agents = listener.gather(timeout_s=self.backend.gather_timeout_s, say=self._say)
            job = job_reference(self.backend, self._config.job)
            return run_session(plan, connect, job=job, on_first_step=self.on_first_step)


def _code_for_controller(outcome: RunOutcome, others: Mapping[str, TcpConnection]) -> int:
    """Return the exit code of this pod: 75, "start me again", if it did not cause the end.

    A deleted pod is replaced, even before its first checkpoint. The controller of a pod that died knows more: it counts
    a crash, and does not count a node that was removed.
    """
    failure = outcome.failure
    if failure is not None and failure.rank is None and failure.host in others and others[failure.host].has_hung_up:
        return EXIT_PREEMPTED
    return EXIT_PREEMPTED if outcome.status == "cancelled" else outcome.exit_code


def prepare_in_cluster(run: Run, backend: KubernetesBackend, config: PodConfig) -> PreparedRun:
    """Return the run with the addresses that this cluster gives its pods.

    Raises:
        ConfigErrors: every reason why the run cannot work.
    """
    identity = config.identity
    folder = Path(identity.run_dir)
    is_first_life = not folder.is_dir() or not any(folder.iterdir())
    prepared = replan(
        run if is_first_life else _continued(run, RunDir(folder), run_id=identity.run_id),
        _hosts_here(backend, config, max_ranks=run.job.max_ranks(run)),
        run_id=identity.run_id,
        folder=folder,
        port=identity.port,
        is_fresh=is_first_life,
    )
    return replace(prepared, plan=_in_cluster(prepared.plan))


def _continued(run: Run, run_dir: RunDir, *, run_id: str) -> Run:
    """Return the run, set to resume from the newest checkpoint of an earlier pod."""
    if foreign := list(validate_run_dir(replace(run, checkpoint=replace(run.checkpoint, resume="auto")), run_dir)):
        raise ConfigErrors(foreign)
    found = read_json(run_dir.plan)["run_id"] if run_dir.plan.is_file() else run_id
    if found != run_id:
        why = f"holds the run {found}, and two runs cannot share a directory"
        raise ConfigError("run.dir", run_dir.path, why=why, fix="choose another")
    if not any(run_dir.checkpoints.glob("step_*/manifest.json")):
        return run
    return replace(run, checkpoint=replace(run.checkpoint, resume="auto"))


def _hosts_here(backend: KubernetesBackend, config: PodConfig, *, max_ranks: int | None) -> Sequence[Host]:
    hosts = []
    for number, host in enumerate(backend.hosts(max_ranks=max_ranks)):
        address = pod_address(backend.workload, config.job, number)
        login = address if number else ""  # the first pod is this one
        hosts.append(replace(host, address=address, ssh_destination=login, python=sys.executable))
    return hosts


def _in_cluster(plan: Plan) -> Plan:
    return replace(
        plan,
        # Kubernetes sends SIGTERM only: here it means "save, you will be resumed", as SIGUSR1 does elsewhere
        grace_s=max(plan.grace_s, plan.preempt_grace_s),
        # every pod has them from the Secret; the network between pods is not encrypted
        forwarded_env=(),
    )
