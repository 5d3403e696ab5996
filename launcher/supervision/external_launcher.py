"""Host agent for ranks that an external launcher starts.

Started with ``python -m launcher.supervision.external_launcher``.

It runs beside the session, starts that launcher (pdsh, mpirun, srun), and supervises the ranks of every host through
the run directory. It relies neither on the launcher's exit code nor on its way to end ranks: deepspeed exits with 0
when pdsh is killed, and cleans up with a ``pkill -f`` that ends every deepspeed process on those hosts. So the launcher
is only ever killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

from launcher.errors.secrets import is_secret
from launcher.plugins.loading import PLUGIN_PATH
from launcher.protocol.messages import CommandExited, LauncherStarted, UserNote
from launcher.protocol.plan import Command, HostPlan, Plan, plan_from_json
from launcher.protocol.rundir import RunDir
from launcher.protocol.wire import MalformedMessage, decode
from launcher.supervision.agent_entry import serve_assignment
from launcher.supervision.child_process import ChildProcess
from launcher.supervision.file_channel import (
    WRITE_EVERY_S,
    AgentFile,
    Lease,
    MonitorFile,
    StartFile,
    agent_file,
    channel_folder,
    rank_file,
    write_channel_file,
)
from launcher.supervision.host_agent import HostAgent
from launcher.supervision.host_ranks import Emit, HostRanks, exit_code_of_status
from launcher.supervision.socket_channel import scratch_folder
from launcher.supervision.stack_dump import StackDump
from launcher.utils.files import read_json
from launcher.utils.logs import LogTail
from launcher.utils.processes import Process, become_subreaper
from launcher.utils.system import code_root

_READ_EVERY_S = 0.25
_REPORT_TIMEOUT_S = 3.0
"""Time for rank monitors to report once the launcher has exited."""
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Prefixes of variables that deepspeed exports and shells may alter.
Ranks read them from the channel instead."""
_SSH_EXITED = re.compile(r"pdsh@[^:]*: (?P<host>\S+): ssh exited with exit code (?P<code>\d{1,3})")


class FileChannelRanks(HostRanks):
    """All ranks of a run.

    Args:
        own: plan of the agent, which names every rank.
        plan: of the run, with the host of each rank.
        run_dir: shared with the hosts.
        scratch: a folder of the agent's own.
        emit: sends a message to the session.
        token: of this start.
    """

    def __init__(self, own: HostPlan, *, plan: Plan, run_dir: RunDir, scratch: Path, emit: Emit, token: str) -> None:
        super().__init__(own, run_dir=run_dir, scratch=scratch, emit=emit)
        self._folder, self._token = channel_folder(run_dir), token
        self._host_of = {place.rank: place.host for place in plan.ranks}
        self._leases = {rank: Lease(plan.heartbeat_timeout_s) for rank in self._ranks}
        self._without_launcher: set[int] = set()
        self._malformed: set[int] = set()
        self._signals: list[int] = []
        self._sequence = 0
        self._write_at = self._read_at = 0.0
        for rank in self._ranks.values():
            rank.log = LogTail(run_dir.log_of(self._host_of[rank.number], rank.number))
        self._write()

    @property
    def living(self) -> list[str]:
        """The ranks that have started and not exited, with their hosts."""
        return [f"{rank.number} on {self._host_of[rank.number]}" for rank in self._ranks.values() if rank.is_alive]

    def has_started_on(self, host: str) -> bool:
        """Return whether a rank of ``host`` has started."""
        return any(self._host_of[rank.number] == host and rank.monitor for rank in self._ranks.values())

    def send(self, number: int) -> int:
        """Have every monitor send a signal to its rank; return the number of living ranks."""
        self._signals.append(number)
        self._write()
        return sum(rank.is_alive for rank in self._ranks.values())

    def dump(self, *, within_s: float) -> None:
        """Have every rank write its Python stacks to its log; ``poll`` sends each of them once."""
        ranks = [rank for rank in self._ranks.values() if rank.is_alive and rank.dump is None]
        for rank in ranks:
            rank.dump = StackDump(None, rank.log.path, within_s=within_s)
        if ranks:
            self.send(signal.SIGUSR2)
            self.send(signal.SIGCONT)  # a suspended rank could not answer otherwise

    def poll(self, *, logs: bool) -> bool:
        """Write the agent's file and read those of the monitors, each when it is time."""
        now = time.monotonic()
        if now >= self._write_at:
            self._write()
        if now >= self._read_at:
            self._read_at = now + _READ_EVERY_S
            for number in self._ranks:
                self._read(number)
            self._drop_silent_hosts()
        return super().poll(logs=logs)

    def close(self) -> None:
        """Mark the run as over, also for ranks that are still starting."""
        self._write(is_over=True)

    def _write(self, *, is_over: bool = False) -> None:
        self._sequence += 1
        self._write_at = time.monotonic() + WRITE_EVERY_S
        content = AgentFile(token=self._token, sequence=self._sequence, signals=self._signals, is_over=is_over)
        with contextlib.suppress(OSError):  # a full or absent disk: the monitors end their ranks if it lasts
            write_channel_file(agent_file(self._folder), content)

    def _read(self, number: int) -> None:
        rank, code = self._ranks[number], None
        if rank.has_exited:
            return
        try:
            content: MonitorFile = decode(rank_file(self._folder, number).read_bytes(), MonitorFile)
            if content.token != self._token or content.monitor_pid is None or content.pid is None:
                return
            if content.status is not None:
                code = exit_code_of_status(content.status)
                if content.time is None:
                    raise MalformedMessage("an exit without its time")
        except OSError:  # not written yet
            return
        except MalformedMessage as problem:  # its lease is not renewed, so a monitor that keeps doing so times out
            if number not in self._malformed:
                self._malformed.add(number)
                self._emit(UserNote(text=f"the rank monitor of rank {number} wrote {problem}"))
            return
        self._leases[number].renew(content.sequence)
        # processes of another machine, known by their PIDs there
        rank.monitor, rank.process = Process(content.monitor_pid, 0), Process(content.pid, 0)
        self._send_heartbeat(rank, content.heartbeat, age_s=content.age_s)
        if content.launcher_exited_at is not None and number not in self._without_launcher:
            self._without_launcher.add(number)
            host = self._host_of[number]
            reason = f"the launcher of the ranks on {host} was killed, so they were ended"
            self._report_host(host, reason, at=content.launcher_exited_at)
        if code is not None and content.time is not None:
            self._report_exit(rank, time=content.time, code=code, by_launcher=content.by_launcher)

    def _drop_silent_hosts(self) -> None:
        """Report hosts whose monitors are silent, and count their ranks as exited."""
        silent: dict[str, list[int]] = defaultdict(list)
        for rank in self._ranks.values():
            if rank.is_alive and self._leases[rank.number].is_expired:
                rank.has_exited = True
                silent[self._host_of[rank.number]].append(rank.number)
        for host, numbers in silent.items():
            silent_s = self._leases[numbers[0]].silent_s
            cause = "it is down, frozen, or cut off from the run directory"
            self._report_host(
                host, f"no heartbeat from {host} for {silent_s:.0f} s: {cause}", at=time.time() - silent_s
            )

    def _report_host(self, host: str, reason: str, *, at: float) -> None:
        role = f"host {host}"
        self._emit(CommandExited(name=host, role=role, time=at, code=1, signal=None, tail="", reason=reason))


class ExternalLauncherAgent(HostAgent):
    """Supervises ranks on other machines."""

    def _watch_ranks(self, scratch: Path) -> HostRanks:
        self._run_plan = plan_from_json(read_json(self._run_dir.plan))
        token, folder = secrets.token_hex(8), channel_folder(self._run_dir)
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():  # of an earlier attempt
            path.unlink()
        cwd = Path.cwd()
        os.chdir(code_root())  # deepspeed writes its working folder into a remote command, without quotes
        sent = (*self._run_plan.forwarded_env, PLUGIN_PATH)
        env = {name: os.environ[name] for name in sent if name in os.environ}
        env = {name: value for name, value in env.items() if not is_secret(name, value)}
        write_channel_file(folder / "start.json", StartFile(token=token, cwd=str(cwd), env=env))
        self._channel_ranks = FileChannelRanks(
            self._plan,
            plan=self._run_plan,
            run_dir=self._run_dir,
            scratch=scratch,
            emit=self._session.send,
            token=token,
        )
        return self._channel_ranks

    def _launch(self) -> ChildProcess | None:
        child = super()._launch()
        for host in self._run_plan.hosts if child else ():
            self._session.send(LauncherStarted(host=host.host.name))
        return child

    def _env_of(self, command: Command) -> dict[str, str]:
        env = super()._env_of(command)
        if command is self._plan.agent_command:
            env = {name: value for name, value in env.items() if not name.startswith(_EXPORTED)}
            env |= command.env
        return env

    def _end_command(self, child: ChildProcess, number: int) -> None:
        child.process.send(signal.SIGKILL)

    def _write_log(self, line: str) -> None:
        super()._write_log(line)
        if (found := _SSH_EXITED.fullmatch(line.strip())) and not self._channel_ranks.has_started_on(found["host"]):
            self._report_failed_ssh(found["host"], min(int(found["code"]), 255))

    def _report_failed_ssh(self, host: str, code: int) -> None:
        """Report that pdsh started no rank on ``host``; pdsh exits only after all other hosts."""
        lines = self._current.tail.splitlines() if self._current else []
        tail = "\n".join(line for line in lines if line.startswith(f"{host}:"))
        reason, now = f"no rank started on {host}: its ssh ended with exit code {code}", time.time()
        self._session.send(
            CommandExited(name="ssh", role=f"ssh {host}", time=now, code=code, signal=None, tail=tail, reason=reason)
        )

    def _report_exit(self, child: ChildProcess, *, role: str) -> None:
        deadline = time.monotonic() + (_REPORT_TIMEOUT_S if child.code == 0 else 0.0)
        self._wait(lambda: not self._ranks.any_alive() or time.monotonic() > deadline or self._is_grace_over())
        if child.code == 0 and (living := self._channel_ranks.living) and not self._is_grace_over():
            reason = f"{child.name} ended with exit code 0 before rank {' and '.join(living)} did"
            reason += ": its connection to the hosts was killed or cut off"
            now, role = time.time(), "connection"
            self._session.send(
                CommandExited(name=child.name, role=role, time=now, code=1, signal=None, tail=child.tail, reason=reason)
            )
        else:
            super()._report_exit(child, role=role)

    def _end_all_but_sidecars(self) -> None:
        """Kill the ranks on all hosts, and wait until each has exited or its monitor has timed out."""
        if self._ranks.any_alive():
            self._ranks.send(signal.SIGKILL)
            self._wait(lambda: not self._ranks.any_alive())
        super()._end_all_but_sidecars()
        self._channel_ranks.close()


def main() -> None:
    """Serve the assignment on stdin."""
    become_subreaper()
    with scratch_folder() as scratch:
        serve_assignment(
            read_fd=sys.stdin.fileno(), write_fd=sys.stdout.fileno(), scratch=scratch, agent=ExternalLauncherAgent
        )


if __name__ == "__main__":
    main()
