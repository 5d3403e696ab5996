"""The agent of runs whose ranks other people's launchers start, ``python -m launcher.supervise.board_agent``.

It runs beside the session, has that launcher below it, and watches the ranks of every host through the run directory.
Neither the launcher's exit code nor its way to end ranks is relied upon: deepspeed exits with 0 when pdsh is killed,
and cleans up with a ``pkill -f`` that ends everybody's deepspeed on those hosts. So it is never asked, only killed.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import sys
import time
from pathlib import Path

from launcher.files import read_json
from launcher.plan import Command, plan_from_json
from launcher.remote.bundle import code_root
from launcher.secrecy import is_secret
from launcher.supervise.agent import serve
from launcher.supervise.board import board_of, post
from launcher.supervise.board_ranks import BoardRanks
from launcher.supervise.child import Child
from launcher.supervise.host_agent import HostAgent
from launcher.supervise.link import scratch_folder
from launcher.supervise.linux import become_subreaper
from launcher.supervise.messages import CommandEnded, Started
from launcher.supervise.ranks import Ranks

_REPORTS_S = 3.0
"""Time that guards get to report once the launcher has ended."""

_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""What deepspeed exports on hosts by itself, mangled by their shells; ranks get it from us instead."""

_GONE = re.compile(r"pdsh@[^:]*: (?P<host>\S+): ssh exited with exit code (?P<code>\d+)")


class BoardAgent(HostAgent):
    """Watches over ranks that are elsewhere."""

    def _watch_ranks(self, scratch: Path) -> Ranks:
        self._whole = plan_from_json(read_json(self._run_dir.plan))
        token, board = secrets.token_hex(8), board_of(self._run_dir)
        board.mkdir(exist_ok=True)
        for path in board.iterdir():  # of an earlier attempt
            path.unlink()
        cwd = Path.cwd()
        os.chdir(code_root())  # deepspeed writes its own into a remote command, without quotes
        env = {name: os.environ[name] for name in self._whole.forward if name in os.environ}
        env = {name: value for name, value in env.items() if not is_secret(name, value)}
        post(board / "start.json", {"token": token, "cwd": str(cwd), "env": env})
        self._board_ranks = BoardRanks(
            self._plan, plan=self._whole, run_dir=self._run_dir, scratch=scratch, emit=self._uplink.send, token=token
        )
        return self._board_ranks

    def _launch(self) -> Child | None:
        child = super()._launch()
        for host in self._whole.hosts if child else ():
            self._uplink.send(Started(host=host.host.name))
        return child

    def _env_of(self, command: Command) -> dict[str, str]:
        env = super()._env_of(command)
        if command is self._plan.start:
            env = {name: value for name, value in env.items() if not name.startswith(_EXPORTED)}
            env |= command.env
        return env

    def _end_command(self, child: Child, number: int) -> None:
        child.process.send(signal.SIGKILL)

    def _write_down(self, line: str) -> None:
        super()._write_down(line)
        if (found := _GONE.fullmatch(line.strip())) and not self._board_ranks.has_begun_on(found["host"]):
            self._miss(found["host"], int(found["code"]))

    def _miss(self, host: str, code: int) -> None:
        """Tell that pdsh did not bring a rank up on ``host``: it would say nothing until every other host is done."""
        said = (
            [line for line in self._current.tail.splitlines() if line.startswith(f"{host}:")] if self._current else []
        )
        why = f"no rank began on {host}: its ssh ended with exit code {code}"
        tail, now = "\n".join(said), time.time()
        self._uplink.send(
            CommandEnded(name="ssh", role=f"ssh {host}", time=now, code=code, signal=None, tail=tail, why=why)
        )

    def _report_end(self, child: Child, *, role: str) -> None:
        deadline = time.monotonic() + (_REPORTS_S if child.code == 0 else 0.0)
        self._wait(lambda: not self._ranks.any_alive() or time.monotonic() > deadline or self._is_over())
        if child.code == 0 and (living := self._board_ranks.living) and not self._is_over():
            why = f"{child.name} ended with exit code 0 before rank {' and '.join(living)} did"
            why += ": what connected it with the hosts was killed or cut off"
            now, role = time.time(), "connection"
            self._uplink.send(
                CommandEnded(name=child.name, role=role, time=now, code=1, signal=None, tail=child.tail, why=why)
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
        serve(inbox=sys.stdin.fileno(), outbox=sys.stdout.fileno(), scratch=scratch, agent=BoardAgent)


if __name__ == "__main__":
    main()
