"""``launch logs``: what the ranks of a run print."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from io import TextIOWrapper

from launcher.cli.arguments import Arguments
from launcher.errors import ConfigError
from launcher.runs.index import find_run
from launcher.runs.logs import RunLogs
from launcher.runs.state import RunState, read_run_state
from launcher.utils.text import did_you_mean, printable

_POLL_S = 0.2
_EXIT_LOST = 1
_EXIT_INTERRUPTED = 130


def run(arguments: Arguments) -> int:
    """Print the logs of a run."""
    run_dir = find_run(arguments.run, arguments.root)
    state = read_run_state(run_dir)
    _check(arguments, state)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a rank may print characters that the terminal cannot encode
    if state.cluster_job is not None:
        return _of_pods(arguments, state.cluster_job)
    logs = RunLogs(
        run_dir,
        rank=arguments.rank,
        host=arguments.host,
        agents=arguments.agents,
        last=arguments.lines,
    )
    if not arguments.follow:
        _print(logs.read())
        _print(logs.rest())
        return 0
    try:
        return _follow(logs, state)
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def _of_pods(arguments: Arguments, job: dict[str, str]) -> int:
    """Print what the pods of a run print, whose files are in the cluster.

    Raises:
        EnvironmentProblem: the cluster does not answer, or has no pods of the run.
    """
    from launcher.backends.kubernetes.cluster_run import ClusterRun
    from launcher.backends.kubernetes.pod_logs import LogFilter, follow, read_agent_logs, read_logs

    run, last = ClusterRun.of_job(job), arguments.lines
    wanted = LogFilter(rank=arguments.rank, host=arguments.host)
    if arguments.agents:
        if arguments.follow:
            fix = "leave -f out, or --agents"
            raise ConfigError("--follow", why="the agents of pods cannot be followed, only ranks", fix=fix)
        _print(read_agent_logs(run, host=arguments.host, last=last))
    elif not arguments.follow:
        _print(read_logs(run, wanted, last=last))
    else:
        try:
            outcome = follow(
                run, arrived=(), wanted=wanted, last=last, say=lambda text: print(text, file=sys.stderr, flush=True)
            )
        except KeyboardInterrupt:
            return _EXIT_INTERRUPTED
        assert outcome is not None, "no signal ends the following"
        return _say_end(outcome.status, outcome.exit_code)
    return 0


def _check(arguments: Arguments, state: RunState) -> None:
    """Raise for a rank or host that the run does not have."""
    hosts = [host["name"] for host in state.hosts]
    host, rank = arguments.host, arguments.rank
    if hosts and host is not None and host not in hosts:
        raise ConfigError("--host", host, why="is not a host of this run", fix=did_you_mean(host, hosts))
    if rank is not None and arguments.agents:
        raise ConfigError("--rank", rank, why="cannot be combined with --agents", fix="use --host to choose an agent")
    if state.slots and rank is not None and rank >= sum(state.slots):
        raise ConfigError("--rank", rank, why="is not in this run", fix=f"choose from 0 to {sum(state.slots) - 1}")


def _follow(logs: RunLogs, state: RunState) -> int:
    while True:
        is_over = state.is_over  # looked up before reading, so that everything written before the end is read
        _print(logs.read())
        if is_over:
            break
        time.sleep(_POLL_S)
        state = read_run_state(state.run_dir)
    _print(logs.rest())
    return _say_end(state.status, _EXIT_LOST if state.exit_code is None else state.exit_code)


def _say_end(status: str, code: int) -> int:
    print(f"the run is {status} (exit code {code})" if code else f"the run is {status}", file=sys.stderr)
    return code


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable(line))
    sys.stdout.flush()
