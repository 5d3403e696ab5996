"""Host agent for ranks that an external launcher starts.

Started with ``python -m launcher.supervision.external_launcher``.

It runs beside the session, has that launcher (pdsh, mpirun, srun) below it, and watches the ranks of every host through
the run directory. Neither the launcher's exit code nor its way to end ranks is relied upon: deepspeed exits with 0 when
pdsh is killed, and cleans up with a ``pkill -f`` that ends everybody's deepspeed on those hosts. So it is never asked,
only killed.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors.secrets import is_secret
from launcher.protocol.heartbeat import HEARTBEAT_FIELDS
from launcher.protocol.messages import CommandExited, LauncherStarted, RankHeartbeat, UserNote
from launcher.protocol.plan import Command, HostPlan, Plan, plan_from_json
from launcher.protocol.rundir import RunDir
from launcher.protocol.wire import MalformedMessage, require_fields
from launcher.supervision.agent_entry import serve_assignment
from launcher.supervision.child_process import ChildProcess
from launcher.supervision.file_channel import (
    RANK_FIELDS,
    RENEW_S,
    Lease,
    agent_file,
    channel_folder,
    rank_file,
    read_channel_file,
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
"""Time that guards get to report once the launcher has ended."""


_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""What deepspeed exports on hosts by itself, mangled by their shells; ranks get it from us instead."""


_SSH_EXITED = re.compile(r"pdsh@[^:]*: (?P<host>\S+): ssh exited with exit code (?P<code>\d+)")


class FileChannelRanks(HostRanks):
    """All ranks of a run.

    Args:
        mine: what the agent was assigned: it names every rank.
        plan: says on which host each of them is.
        run_dir: shared with the hosts.
        scratch: a folder of the agent's own.
        emit: takes what there is to tell.
        token: of this start.
    """

    def __init__(self, mine: HostPlan, *, plan: Plan, run_dir: RunDir, scratch: Path, emit: Emit, token: str) -> None:
        super().__init__(mine, run_dir=run_dir, scratch=scratch, emit=emit)
        self._board, self._token = channel_folder(run_dir), token
        self._host_of = {place.rank: place.host for place in plan.ranks}
        self._leases = {rank: Lease(plan.heartbeat_timeout_s) for rank in self._ranks}
        self._orphans: set[int] = set()
        self._unsound: set[int] = set()
        self._signals: list[int] = []
        self._turn = 0
        self._next_post = self._next_look = 0.0
        for rank in self._ranks.values():
            rank.log = LogTail(run_dir.log_of(self._host_of[rank.number], rank.number))
        self._post()

    @property
    def living(self) -> list[str]:
        """The ranks that have begun and not ended, with their hosts."""
        return [f"{rank.number} on {self._host_of[rank.number]}" for rank in self._ranks.values() if rank.is_alive]

    def has_begun_on(self, host: str) -> bool:
        """Return whether a rank of ``host`` was heard of."""
        return any(self._host_of[rank.number] == host and rank.guard for rank in self._ranks.values())

    def send(self, number: int) -> int:
        """Have every guard send a signal to its rank; return how many ranks live."""
        self._signals.append(number)
        self._post()
        return sum(rank.is_alive for rank in self._ranks.values())

    def dump(self, *, within_s: float) -> None:
        """Have every rank write its Python stacks to its log; ``poll`` sends each of them on, once."""
        asked = [rank for rank in self._ranks.values() if rank.is_alive and rank.dump is None]
        for rank in asked:
            rank.dump = StackDump(None, rank.log.path, within_s=within_s)
        if asked:
            self.send(signal.SIGUSR2)
            self.send(signal.SIGCONT)  # one that a signal had stopped could not answer otherwise

    def poll(self, *, logs: bool) -> bool:
        """Renew our sign of life, and read what the guards have posted."""
        now = time.monotonic()
        if now >= self._next_post:
            self._post()
        if now >= self._next_look:
            self._next_look = now + _READ_EVERY_S
            for number in self._ranks:
                self._look_at(number)
            self._notice_silence()
        return super().poll(logs=logs)

    def close(self) -> None:
        """Say that the run is over, to ranks that were on their way too."""
        self._post(over=True)

    def _post(self, *, over: bool = False) -> None:
        self._turn += 1
        self._next_post = time.monotonic() + RENEW_S
        content = {"token": self._token, "turn": self._turn, "signals": self._signals, "over": over}
        with contextlib.suppress(OSError):  # a full or absent disk: the guards end their ranks when it lasts
            write_channel_file(agent_file(self._board), content)

    def _look_at(self, number: int) -> None:
        rank, said = self._ranks[number], read_channel_file(rank_file(self._board, number), RANK_FIELDS)
        if rank.has_ended or said is None or said["token"] != self._token or "guard" not in said:
            return
        try:
            _require_valid(said)
        except MalformedMessage as problem:  # its lease is not renewed: a guard that keeps on so counts as gone
            if number not in self._unsound:
                self._unsound.add(number)
                self._emit(UserNote(text=f"the guard of rank {number} posted {problem}"))
            return
        self._leases[number].renew(said["turn"])
        rank.guard, rank.process = Process(said["guard"], 0), Process(said["pid"], 0)  # known by their numbers there
        heartbeat = said["heartbeat"]
        if heartbeat is not None and heartbeat["at"] != rank.beat_at:
            rank.beat_at = heartbeat.pop("at")
            self._emit(RankHeartbeat(rank=number, age_s=said["age_s"], **heartbeat))
        if "is_orphan" in said and number not in self._orphans:
            self._orphans.add(number)
            host = self._host_of[number]
            self._tell_of_host(host, f"what started the ranks on {host} was killed; they were ended, too")
        if "status" in said:
            self._end(
                rank, time=said["time"], code=exit_code_of_status(said["status"]), by_launcher=said["by_launcher"]
            )

    def _notice_silence(self) -> None:
        """Give up ranks whose guards have fallen silent: host by host, because that is what went."""
        silent: dict[str, list[int]] = defaultdict(list)
        for rank in self._ranks.values():
            if rank.is_alive and self._leases[rank.number].is_over:
                rank.has_ended = True
                silent[self._host_of[rank.number]].append(rank.number)
        for host, numbers in silent.items():
            for_s = self._leases[numbers[0]].silent_s
            why = (
                f"nothing was heard of {host} for {for_s:.0f} s: it is down, frozen, or cut off from the run directory"
            )
            self._tell_of_host(host, why, ago_s=for_s)

    def _tell_of_host(self, host: str, why: str, *, ago_s: float = 0.0) -> None:
        now, role = time.time() - ago_s, f"host {host}"
        self._emit(CommandExited(name=host, role=role, time=now, code=1, signal=None, tail="", why=why))


def _require_valid(said: Mapping[str, Any]) -> None:
    """Raise ``MalformedMessage`` for a file that has the parts of a guard's file in another form."""
    require_fields(said, {"guard": int, "pid": int})
    if said["heartbeat"] is not None:
        require_fields(said["heartbeat"], HEARTBEAT_FIELDS)
        if said["heartbeat"].keys() != HEARTBEAT_FIELDS.keys():
            raise MalformedMessage("a beat with other fields than a beat has")
    if "status" in said:
        require_fields(said, {"status": int, "time": float, "by_launcher": bool})
        exit_code_of_status(said["status"])


class ExternalLauncherAgent(HostAgent):
    """Watches over ranks that are elsewhere."""

    def _watch_ranks(self, scratch: Path) -> HostRanks:
        self._whole = plan_from_json(read_json(self._run_dir.plan))
        token, board = secrets.token_hex(8), channel_folder(self._run_dir)
        board.mkdir(exist_ok=True)
        for path in board.iterdir():  # of an earlier attempt
            path.unlink()
        cwd = Path.cwd()
        os.chdir(code_root())  # deepspeed writes its own into a remote command, without quotes
        env = {name: os.environ[name] for name in self._whole.forwarded_env if name in os.environ}
        env = {name: value for name, value in env.items() if not is_secret(name, value)}
        write_channel_file(board / "start.json", {"token": token, "cwd": str(cwd), "env": env})
        self._board_ranks = FileChannelRanks(
            self._plan, plan=self._whole, run_dir=self._run_dir, scratch=scratch, emit=self._uplink.send, token=token
        )
        return self._board_ranks

    def _launch(self) -> ChildProcess | None:
        child = super()._launch()
        for host in self._whole.hosts if child else ():
            self._uplink.send(LauncherStarted(host=host.host.name))
        return child

    def _env_of(self, command: Command) -> dict[str, str]:
        env = super()._env_of(command)
        if command is self._plan.agent_command:
            env = {name: value for name, value in env.items() if not name.startswith(_EXPORTED)}
            env |= command.env
        return env

    def _end_command(self, child: ChildProcess, number: int) -> None:
        child.process.send(signal.SIGKILL)

    def _write_down(self, line: str) -> None:
        super()._write_down(line)
        if (found := _SSH_EXITED.fullmatch(line.strip())) and not self._board_ranks.has_begun_on(found["host"]):
            self._miss(found["host"], int(found["code"]))

    def _miss(self, host: str, code: int) -> None:
        """Tell that pdsh did not bring a rank up on ``host``: it would say nothing until every other host is done."""
        said = (
            [line for line in self._current.tail.splitlines() if line.startswith(f"{host}:")] if self._current else []
        )
        why = f"no rank began on {host}: its ssh ended with exit code {code}"
        tail, now = "\n".join(said), time.time()
        self._uplink.send(
            CommandExited(name="ssh", role=f"ssh {host}", time=now, code=code, signal=None, tail=tail, why=why)
        )

    def _report_end(self, child: ChildProcess, *, role: str) -> None:
        deadline = time.monotonic() + (_REPORT_TIMEOUT_S if child.code == 0 else 0.0)
        self._wait(lambda: not self._ranks.any_alive() or time.monotonic() > deadline or self._is_over())
        if child.code == 0 and (living := self._board_ranks.living) and not self._is_over():
            why = f"{child.name} ended with exit code 0 before rank {' and '.join(living)} did"
            why += ": what connected it with the hosts was killed or cut off"
            now, role = time.time(), "connection"
            self._uplink.send(
                CommandExited(name=child.name, role=role, time=now, code=1, signal=None, tail=child.tail, why=why)
            )
        else:
            super()._report_end(child, role=role)

    def _end_all_but_sidecars(self) -> None:
        """Have the ranks everywhere killed, and wait for word of each, or until its guard is silent for too long."""
        if self._ranks.any_alive():
            self._ranks.send(signal.SIGKILL)
            self._wait(lambda: not self._ranks.any_alive())
        super()._end_all_but_sidecars()
        self._board_ranks.close()


def main() -> None:
    """Serve the assignment on stdin."""
    become_subreaper()
    with scratch_folder() as scratch:
        serve_assignment(
            inbox=sys.stdin.fileno(), outbox=sys.stdout.fileno(), scratch=scratch, agent=ExternalLauncherAgent
        )


if __name__ == "__main__":
    main()
