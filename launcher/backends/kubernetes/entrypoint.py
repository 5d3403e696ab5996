"""Entry point of every pod: ``python -m launcher.backends.kubernetes.entrypoint FOLDER``.

The folder holds snapshot, config and key. The first pod runs the session and the agent of its own ranks. The others
connect to it and run agents.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from launcher.errors import EXIT_PREEMPTED, ConfigError, EnvironmentProblem, LauncherError, Unfit

if TYPE_CHECKING:
    from launcher.backends.kubernetes.pod_config import PodConfig
    from launcher.config.backend.kubernetes import KubernetesBackend

_INDEX_VARIABLES = ("JOB_COMPLETION_INDEX", "RANK")
"""Variables with a pod's index: of Indexed Jobs (JobSet, TrainJob), and of PyTorchJobs."""

_CONTROLLER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PET_")
"""Prefixes of variables that controllers set for torchrun; the plan sets its own."""


def main() -> None:
    """Run this pod's part of the run and exit with the code for its controller."""
    # The first process of a container ignores signals without a handler: import as little as possible before this.
    signal.signal(signal.SIGTERM, _end_as_preempted)
    try:
        sys.exit(_code_of_pod(Path(sys.argv[1])))
    except LauncherError as problem:
        code = problem.exit_code if isinstance(problem, ConfigError | Unfit) else 1
        say(f"exit code {code}: {problem}")  # the last line is shown where the run is followed
        sys.exit(code)


def _end_as_preempted(_number: int, _frame: FrameType | None) -> None:
    sys.exit(EXIT_PREEMPTED)


def _code_of_pod(folder: Path) -> int:
    from launcher.backends.kubernetes.leader import run_leader
    from launcher.backends.kubernetes.pod_config import SNAPSHOT_FILE, load_key, load_pod_config
    from launcher.config.backend.kubernetes import KubernetesBackend
    from launcher.config.snapshot import load_run
    from launcher.plugins.loading import path_environment
    from launcher.utils.system import child_environment

    index = index_of(os.environ)
    for name in [name for name in os.environ if name.startswith(_CONTROLLER_VARIABLES)]:
        del os.environ[name]
    os.environ.update(child_environment())
    config = load_pod_config(folder)
    snapshot = (folder / SNAPSHOT_FILE).resolve()  # the kubelet mounts links, which are never read as run.yaml
    run = load_run(snapshot, expected_hash=config.identity.run_hash)
    os.environ.update(path_environment(run.plugins))
    check_plugin_versions(config.plugins, image=getattr(run.backend, "image", ""))
    backend, key = run.backend, load_key(folder)
    if not isinstance(backend, KubernetesBackend):
        raise ConfigError("backend", backend.kind, why="does not run in pods", fix="set backend=kubernetes")
    if index == 0:
        return run_leader(run, backend, config, key=key, say=say)
    return run_agent(backend, config, index=index, key=key)


def check_plugin_versions(expected: Mapping[str, str], *, image: str) -> None:
    """Check that the image has the versions of plugins that the run was planned with.

    Args:
        expected: versions by module; plugins that the image has without a version are not compared.
        image: for the message.

    Raises:
        Unfit: it has another one.
    """
    from launcher.plugins.loading import plugins_of

    for plugin in plugins_of(expected):
        if plugin.version and plugin.version != expected[plugin.module]:
            what = f"its plugin {plugin.module} is {plugin.version} ({plugin.file})"
            there = f"the machine that submitted the run has {expected[plugin.module]}"
            fix = f"build the image {image} (backend.image) with that version"
            raise Unfit(f"{socket.gethostname()}: {what}, and {there}; {fix}")


def index_of(environ: Mapping[str, str]) -> int:
    """Return the index of this pod.

    Raises:
        EnvironmentProblem: no controller set it.
    """
    for name in _INDEX_VARIABLES:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    raise EnvironmentProblem(
        f"none of {', '.join(_INDEX_VARIABLES)} is a number: pods are created by `backend=kubernetes`"
    )


def run_agent(backend: KubernetesBackend, config: PodConfig, *, index: int, key: bytes) -> int:
    """Run the agent of this pod and return the exit code for its controller.

    That is 0 after a completed run, otherwise 75, "start me again": only the first pod reports a failed run, so that
    one failure counts once, however many pods exit.
    """
    from launcher.backends.kubernetes.pod_config import pod_address
    from launcher.supervision.agent_entry import serve_assignment
    from launcher.supervision.socket_channel import scratch_folder
    from launcher.supervision.tcp_connection import connect_to_session
    from launcher.utils.processes import become_subreaper

    become_subreaper()
    address, port = pod_address(backend.workload, config.job, 0), config.session_port
    try:
        peer = connect_to_session(address, port=port, index=index, key=key, timeout_s=backend.gather_timeout_s, say=say)
    except EnvironmentProblem as problem:
        say(str(problem))
        return EXIT_PREEMPTED
    with peer, scratch_folder() as scratch:
        try:
            code = serve_assignment(read_fd=peer.fileno(), write_fd=peer.fileno(), scratch=scratch)
        except EOFError:  # the first pod exited before the run began
            code = EXIT_PREEMPTED
    return 0 if code == 0 else EXIT_PREEMPTED


def say(text: str) -> None:
    """Print one line to the pod's log."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
