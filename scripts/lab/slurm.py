"""A real Slurm cluster of one machine, for tests and for trying things out: no systemd, nothing left behind.

    python scripts/lab/slurm.py up STATE 3        three nodes n1 n2 n3 with 4 CPUs and 2 pretended GPUs each
    export SLURM_CONF=STATE/slurm.conf     now sbatch, squeue, … talk to it
    python scripts/lab/slurm.py down STATE

    python scripts/lab/slurm.py run STATE 3       in the foreground: says "ready", ends when stdin does
    python scripts/lab/slurm.py fail STATE n2     node n2 loses power: its daemon and everything on it is killed

Needs root and, from Debian: munge slurm-client slurmctld slurmd. Partitions: ``main`` without a limit, ``short`` with
five minutes. All daemons, and whatever jobs detach, stay below one process, which ends them all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.utils.files import read_json, write_json
from launcher.utils.processes import Process, become_subreaper, descendants, end_descendants, identify

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "scancel", "unshare")
_START_S = 60.0
_MARK = "LAB_SLURM_NODE"
_NAMESPACES = ("--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
"""A node has its own name and process numbers; disk and network are shared, and its address is a loopback one."""
_INIT = 'hostname "$0" && "$@" & wait'
"""First process of a node: the shell takes in what is orphaned there."""

_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={state}/state
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/run/slurmctld.pid
SlurmdPidFile={state}/run/slurmd.%n.pid
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=30
SlurmdTimeout=15
GresTypes=gpu
"""


@dataclass(frozen=True)
class Cluster:
    """One cluster, known by the folder that holds everything of it."""

    state: Path
    num_nodes: int

    @property
    def nodes(self) -> list[str]:
        """Names of its nodes."""
        return [f"n{number}" for number in range(1, self.num_nodes + 1)]

    @property
    def conf(self) -> Path:
        """What SLURM_CONF must name."""
        return self.state / "slurm.conf"

    @property
    def keeper(self) -> Path:
        """Says which process keeps the cluster."""
        return self.state / "keeper.json"

    def env(self, **more: str) -> dict[str, str]:
        """Return the environment of its daemons and clients."""
        return {**os.environ, "SLURM_CONF": str(self.conf), **more}

    def write(self) -> None:
        """Make its folders and files; every port is free at this moment."""
        for name in ("state", "spool", "run", "log", "gpus"):
            (self.state / name).mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o755)
        key = self.state / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        host, (port, *ports) = socket.gethostname().partition(".")[0], free_ports(self.num_nodes + 1)
        lines = [
            f"NodeName={node} NodeAddr=127.0.1.{number} Port={own} CPUs=4 RealMemory=8000 Gres=gpu:2"
            for number, (node, own) in enumerate(zip(self.nodes, ports, strict=True), start=1)
        ]
        everyone = ",".join(self.nodes)
        lines += [
            f"PartitionName=main Nodes={everyone} Default=YES MaxTime=INFINITE State=UP",
            f"PartitionName=short Nodes={everyone} MaxTime=00:05:00 State=UP",
        ]
        self.conf.write_text(_CONF.format(host=host, port=port, state=self.state) + "\n".join(lines) + "\n")
        for number in range(2):
            (self.state / "gpus" / str(number)).touch()
        gpus = [f"NodeName={node} Name=gpu File={self.state}/gpus/[0-1]" for node in self.nodes]
        (self.state / "gres.conf").write_text("\n".join(["AutoDetect=off", *gpus]) + "\n")

    def start(self) -> None:
        """Start the daemons as children of this process and wait until every node is idle."""
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "run/munged.pid"}
        files |= {"log-file": "log/munged.log", "seed-file": "state/munge.seed"}
        options = [f"--{name}={self.state}/{path}" for name, path in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        self._wait((self.state / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        for node in self.nodes:
            command = ("bash", "-c", _INIT, node, find("slurmd"), "-D", "-N", node, "-f", str(self.conf))
            self._daemon(f"slurmd.{node}", "unshare", *_NAMESPACES, *command, **{_MARK: node})
        self._wait(lambda: self._idle() == self.num_nodes, "slurmctld")

    def stop(self) -> None:
        """Cancel every job, then end everything below this process."""
        quiet = {"env": self.env(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            subprocess.run([find("scancel"), "--user=root"], timeout=5, check=False, **quiet)  # type: ignore[call-overload]
        except subprocess.TimeoutExpired:
            print("slurm does not answer any more: killing it", file=sys.stderr)
        left = end_descendants(os.getpid())
        assert not left, left
        reap()

    def fail(self, node: str) -> None:
        """Kill everything of one node at once, as a power cut does."""
        keeper = self._keeper()
        for process in on_node(descendants(keeper.pid), node):
            process.send(signal.SIGKILL)

    def down(self) -> None:
        """End a cluster that ``up`` started."""
        keeper = self._keeper()
        keeper.send(signal.SIGTERM)
        deadline = time.monotonic() + _START_S
        while keeper.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _keeper(self) -> Process:
        return Process(**read_json(self.keeper))

    def _daemon(self, name: str, program: str, *arguments: str, **env: str) -> None:
        with (self.state / "log" / f"{name}.out").open("ab") as out:
            command = [find(program), *arguments]
            subprocess.Popen(
                command, env=self.env(**env), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def _wait(self, condition: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + _START_S
        while not condition():
            if time.monotonic() > deadline:
                logs = [log.read_text(errors="replace")[-2000:] for log in (self.state / "log").glob(f"{name}*")]
                sys.exit("\n".join([f"{name} does not come up", *logs]))
            time.sleep(0.05)

    def _idle(self) -> int:
        command = [find("sinfo"), "--noheader", "--Node", "--partition=main", "--format=%T"]
        answer = subprocess.run(command, env=self.env(), capture_output=True, text=True, timeout=30, check=False)
        return answer.stdout.split().count("idle")


def on_node(processes: list[Process], node: str) -> Iterator[Process]:
    """Yield the daemon of ``node``, what it started, and what is below that."""
    for process in processes:
        try:
            environ = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:  # it has ended
            continue
        if f"{_MARK}={node}".encode() in environ.split(b"\0"):
            yield from (process, *descendants(process.pid))


def free_ports(count: int) -> list[int]:
    """Return different ports that are free now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def reap() -> None:
    """Take note of the children that have ended, adopted ones too."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def find(program: str) -> str:
    """Return the path of a program; daemons are often not on a user's PATH."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    return path or sys.exit(f"{program} is missing: apt-get install munge slurm-client slurmctld slurmd")


def run(cluster: Cluster) -> None:
    """Keep the cluster until stdin ends or SIGTERM comes."""
    become_subreaper()  # what daemons and jobs detach comes to us
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    me = identify(os.getpid())
    assert me is not None
    try:
        cluster.write()
        write_json(cluster.keeper, vars(me))
        cluster.start()
        print(f"ready\nexport SLURM_CONF={cluster.conf}", flush=True)
        while not select.select([sys.stdin], [], [], 1.0)[0] or os.read(sys.stdin.fileno(), 1):
            reap()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        cluster.stop()


def up(cluster: Cluster) -> None:
    """Start a keeper that outlives this process, and wait until it is ready."""
    cluster.state.mkdir(parents=True, exist_ok=True)
    never, kept_open = os.pipe()  # the keeper holds the other end itself, so its stdin never ends
    command = [sys.executable, __file__, "run", str(cluster.state), str(cluster.num_nodes)]
    log = cluster.state / "keeper.log"
    with log.open("wb") as out:
        keeper = subprocess.Popen(
            command, stdin=never, pass_fds=[kept_open], stdout=out, stderr=out, start_new_session=True
        )
    while keeper.poll() is None and not log.read_text().startswith("ready"):
        time.sleep(0.05)
    print(log.read_text(), end="")
    sys.exit(keeper.returncode or 0)


def main() -> None:
    """Obey the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("up", "down", "run", "fail"))
    parser.add_argument("state", type=lambda text: Path(text).absolute())
    parser.add_argument("what", nargs="?", default="2", help="how many nodes, or which one fails")
    asked = parser.parse_args()
    if asked.verb in ("up", "run"):
        for program in _PROGRAMS:
            find(program)
        (run if asked.verb == "run" else up)(Cluster(asked.state, int(asked.what)))
    elif asked.verb == "fail":
        Cluster(asked.state, 0).fail(asked.what)
    else:
        Cluster(asked.state, 0).down()


if __name__ == "__main__":
    main()
