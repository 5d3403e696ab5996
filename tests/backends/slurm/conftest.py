"""A real Slurm: munged, slurmctld and slurmd of Debian, as processes of the test."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.utils.files import read_json
from launcher.utils.processes import descendants
from tests.conftest import REPOSITORY
from tests.helpers import wait_for
from tests.hosts_lab import ForkOn

LAB = REPOSITORY / "scripts" / "lab" / "slurm.py"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
NODE = b"LAB_SLURM_NODE="
"""How the environment of a node's processes begins the line with its name."""
SBIN = f"{os.environ['PATH']}:/usr/sbin"

SMALL = (
    *("backend=slurm", "backend.threads=1", "tracker=local", "data=synthetic"),
    *(
        "model.num_hidden_layers=1",
        "model.hidden_size=32",
        "model.max_position_embeddings=32",
        "job.sequence_length=16",
        "job.micro_batch=1",
    ),
    *("job.eval_sequences=2", "job.sample_tokens=2", "schedule.warmup_steps=2", "job.log_every=1"),
)


@dataclass(frozen=True)
class Cluster:
    """A running cluster; nodes are called n1, n2, …"""

    state: Path

    @property
    def env(self) -> dict[str, str]:
        """What its clients need."""
        return {"SLURM_CONF": str(self.state / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """Return what one of Slurm's programs answers."""
        env = {**os.environ, **self.env}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    def job(self, run_dir: Path) -> str:
        """Return the number of the job of a run."""
        return read_json(run_dir / "session.json")["job"]["id"]

    def state_of(self, job_id: str) -> str:
        """Return what Slurm says of a job."""
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T")

    def fail(self, node: str) -> None:
        """Cut the power of one node."""
        subprocess.run([sys.executable, LAB, "fail", self.state, node], check=True, timeout=60)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.state

    @property
    def names(self) -> list[str]:
        """The names of its nodes."""
        return self.ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N").split()

    def run(self, name: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command where a node has its files."""
        enter = ("nsenter", f"--target={self._first_processes()[name]}", "--mount")
        return subprocess.run([*enter, *command], capture_output=True, text=True, check=False, timeout=60)

    def working(self) -> list[int]:
        """Return the processes of this program that live on the nodes."""
        nodes = {_process_namespace(str(pid)) for pid in self._first_processes().values()}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _process_namespace(entry.name) in nodes:
                with contextlib.suppress(OSError):
                    if b"launcher." in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def _first_processes(self) -> dict[str, int]:
        """Return the number of the first process of each node that is up, by its name."""
        found = {}
        for process in descendants(read_json(self.state / "keeper.json")["pid"]):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                if re.search(r"^NSpid:.*\t1$", status, re.MULTILINE):
                    environ = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                    (name,) = [word[len(NODE) :] for word in environ if word.startswith(NODE)]
                    found[name.decode()] = process.pid
        return found


def _process_namespace(pid: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


@contextlib.contextmanager
def running(num_nodes: int) -> Iterator[Cluster]:
    """Run a cluster; skip the test where this machine cannot."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SBIN) is None]
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)} missing): apt-get install slurmctld slurmd munge")
    if os.geteuid() != 0 or subprocess.run(["unshare", "--uts", "--pid", "--fork", "true"], check=False).returncode:
        pytest.skip("nodes of a cluster need root and namespaces")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # a socket's name must be short
        state = Path(folder)
        command = [sys.executable, LAB, "run", state, str(num_nodes)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == b"ready\n"
            yield Cluster(state)
            keeper.communicate(timeout=60)  # it ends everything once its stdin does
            assert keeper.returncode == 0


@pytest.fixture(scope="package")
def two_nodes() -> Iterator[Cluster]:
    """Two nodes for all tests."""
    with running(2) as cluster:
        yield cluster


@pytest.fixture
def plain_cluster(two_nodes: Cluster) -> Iterator[Cluster]:
    """Two nodes without a job on them."""
    yield two_nodes
    two_nodes.ask("scancel", "--user=root")
    wait_for(lambda: not two_nodes.ask("squeue", "--noheader"))


@pytest.fixture
def cluster(plain_cluster: Cluster, fork_on: ForkOn) -> Cluster:
    """Those nodes, where interpreters are forked: the first test of the contract starts them without forks."""
    fork_on(plain_cluster)
    return plain_cluster


@pytest.fixture
def doomed_cluster(fork_on: ForkOn) -> Iterator[Cluster]:
    """Two nodes for one test, which may break them, with forks."""
    with running(2) as cluster:
        fork_on(cluster)
        yield cluster
