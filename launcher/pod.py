"""The entry of every pod: ``python -m launcher.pod FOLDER``, where the folder holds snapshot, orders and key.

The first pod runs the session and the agent of its own ranks. The others dial in to it and are agents.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from launcher.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError, EnvironmentProblem, LauncherError

if TYPE_CHECKING:
    from launcher.backends.kubernetes.backend import Kubernetes
    from launcher.backends.kubernetes.orders import PodOrders

_INDEX = ("JOB_COMPLETION_INDEX", "RANK")
"""Who tells a pod its number: Indexed Jobs and what is made of them; PyTorchJobs."""

_OF_CONTROLLERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PET_")
"""Beginnings of variables that controllers set for torchrun; ours come from the plan."""


def main() -> None:
    """Do this pod's part of the run and exit as its controller must see it."""
    # The first process of a container has no default action: what is imported before this line leaves it deaf so long.
    signal.signal(signal.SIGTERM, _end_as_preempted)
    try:
        sys.exit(_code_of_pod(Path(sys.argv[1])))
    except LauncherError as problem:
        say(str(problem))
        sys.exit(EXIT_USER_ERROR if isinstance(problem, ConfigError) else 1)


def _end_as_preempted(_number: int, _frame: FrameType | None) -> None:
    sys.exit(EXIT_PREEMPTED)


def _code_of_pod(folder: Path) -> int:
    from launcher.backends.kubernetes.backend import Kubernetes
    from launcher.backends.kubernetes.orders import SNAPSHOT, load_key, load_orders
    from launcher.first_pod import lead
    from launcher.snapshot import load_run

    index = index_of(os.environ)
    for name in [name for name in os.environ if name.startswith(_OF_CONTROLLERS)]:
        del os.environ[name]
    orders = load_orders(folder)
    run = load_run(folder / SNAPSHOT, expected_hash=orders.identity.run_hash)
    backend, key = run.backend, load_key(folder)
    if not isinstance(backend, Kubernetes):
        raise ConfigError("backend", backend.kind, why="runs in no pod", fix="set backend=kubernetes")
    if index == 0:
        return lead(run, backend, orders, key=key, say=say)
    return join(backend, orders, index=index, key=key)


def index_of(environ: Mapping[str, str]) -> int:
    """Return the number of this pod.

    Raises:
        EnvironmentProblem: no controller told it.
    """
    for name in _INDEX:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    raise EnvironmentProblem(f"none of {', '.join(_INDEX)} is a number: pods are made by `backend=kubernetes`")


def join(backend: Kubernetes, orders: PodOrders, *, index: int, key: bytes) -> int:
    """Be the agent of this pod and return what its controller must hear.

    That is 0 after a run that went well. After any other it is 75, "start me again": the first pod alone says whether
    the run failed, so that one failure counts once, however many pods it ends.
    """
    from launcher.backends.kubernetes.names import address_of
    from launcher.supervise.agent import serve
    from launcher.supervise.dialin import dial
    from launcher.supervise.link import scratch_folder
    from launcher.supervise.linux import become_subreaper

    become_subreaper()
    address, port = address_of(backend.workload, orders.job, 0), orders.session_port
    try:
        peer = dial(address, port=port, index=index, key=key, timeout_s=backend.gather_timeout_s, say=say)
    except EnvironmentProblem as problem:
        say(str(problem))
        return EXIT_PREEMPTED
    with peer, scratch_folder() as scratch:
        try:
            code = serve(inbox=peer.fileno(), outbox=peer.fileno(), scratch=scratch)
        except EOFError:  # the first pod went before the run began
            code = EXIT_PREEMPTED
    return 0 if code == 0 else EXIT_PREEMPTED


def say(text: str) -> None:
    """Print one line to the pod's log."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
