"""Runs under a real session, agent and rank monitors, with ranks that need no torch."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from launcher.protocol.plan import Command, Plan
from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_json, write_json
from launcher.utils.schema import to_tree
from tests.conftest import Start, Started, start_interpreter
from tests.helpers import wait_for
from tests.processes import kill_marked, marked, marked_environment, new_mark, wait_for_marked

PROGRAMS = Path(__file__).parent / "programs"


@dataclass
class Supervised:
    """One run, started as a process."""

    run_dir: RunDir
    process: Started
    mark: str
    out: Path
    err: Path

    def wait_until_up(self) -> None:
        """Wait until both ranks work."""
        self.wait_for(lambda: all((self.run_dir.path / f"up.{rank}").exists() for rank in range(2)))
        time.sleep(0.05)  # the file exists before its content

    def wait_for(self, condition, seconds: float = 60) -> None:
        wait_for(condition, seconds=seconds, process=self.process, shown=lambda: self.text)

    def end(self, seconds: float = 60) -> int:
        """Wait for the session and return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in self.left():
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"still running after {seconds} s:\n{self.text}")

    def pid(self, who: str) -> int:
        """Return a process number; ``monitor`` and ``rank`` are those of rank 1."""
        if who == "session":
            return self.process.pid
        if who == "rank":
            return int((self.run_dir.path / "up.1").read_text())
        if who == "monitor":
            return int(Path(f"/proc/{self.pid('rank')}/stat").read_text().split()[3])
        names = {
            "agent": "launcher.supervision.agent_entry",
            "spawner": "spawner.py",
            "torchrun": "torch.distributed.run",
        }
        wanted = names[who]
        return next(pid for pid in self.left() if wanted in Path(f"/proc/{pid}/cmdline").read_text())

    def left(self) -> list[int]:
        """Return the living processes that inherited the mark of this run."""
        return [process.pid for process in marked(self.mark)]

    def seconds_until_gone(self, limit: float = 10) -> float:
        """Wait until nothing of the run is left; fail after ``limit`` seconds."""
        started = time.monotonic()
        if left := wait_for_marked(self.mark, seconds=limit):
            kill_marked(self.mark)
            pytest.fail(f"left behind: {left}\n{self.text}")
        return time.monotonic() - started

    @property
    def result(self) -> dict:
        return read_json(self.run_dir.result)

    @property
    def failure(self) -> dict:
        return read_json(self.run_dir.failure)

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    @property
    def text(self) -> str:
        return self.stdout + self.stderr


@dataclass
class Starter:
    """Starts runs below one folder."""

    folder: Path
    scratch: Path
    plan: Plan
    started: list[Supervised] = field(default_factory=list)
    readers: list[subprocess.Popen] = field(default_factory=list)

    def __call__(
        self,
        do: dict[int, str] | str,
        *,
        env: dict[str, str] | None = None,
        reader: str | None = None,
        terminal: int | None = None,
        plan: Plan | None = None,
        torchrun_on: int | None = None,
        start: Start = start_interpreter,
        **changes,
    ) -> Supervised:
        """Start ranks that each do what ``do`` says; ``changes`` replaces fields of the plan or of its host.

        With a ``start`` of ``preloading`` all its processes are forked from one that has imported what they need.
        """
        mark = new_mark()
        run_dir = RunDir(self.folder / mark[:8])
        run_dir.logs.mkdir(parents=True)
        plan = plan or self.plan
        actions = {str(place.rank): do if isinstance(do, str) else do[place.rank] for place in plan.ranks}
        parts = {name: changes.pop(name, ()) for name in ("build_commands", "sidecars")}
        usual = start_of(run_dir, actions, torchrun_on=torchrun_on)
        box = replace(plan.hosts[0].host, python=sys.executable)
        host = replace(plan.hosts[0], host=box, agent_command=changes.pop("agent_command", usual), **parts)
        settings = {"stall_timeout_s": 0.0, "grace_s": 1.0, "handles_preemption": False, **changes}
        plan = replace(plan, hosts=(host,), run_dir=str(run_dir.path), **settings)
        write_json(run_dir.plan, to_tree(plan))
        out, err = run_dir.path / "stdout", run_dir.path / "stderr"
        with contextlib.ExitStack() as files:
            stdout = files.enter_context(out.open("wb"))
            stderr = files.enter_context(err.open("wb"))
            if reader is not None:  # it reads a little and goes
                pipe = subprocess.Popen([reader], stdin=subprocess.PIPE, stdout=stdout)
                self.readers.append(pipe)
                stdout = files.enter_context(pipe.stdin)
            command = [sys.executable, str(PROGRAMS / "parent.py"), str(run_dir.plan)]
            whole = marked_environment(mark, {"TMPDIR": str(self.scratch), **(env or {})})
            if terminal is None:
                process = start(command, cwd=Path.cwd(), env=whole, stdout=stdout, stderr=stderr)
            else:  # "setsid --ctty" makes it the process that receives SIGHUP when the terminal closes
                command = ["setsid", "--ctty", *command]
                process = subprocess.Popen(command, env=whole, stdin=terminal, stdout=terminal, stderr=terminal)
        run = Supervised(run_dir, process, mark, out, err)
        self.started.append(run)
        return run


def start_of(run_dir: RunDir, actions: dict[str, str], *, torchrun_on: int | None) -> Command:
    """Return the command that starts ranks with these actions: the real torchrun when it is given a port."""
    spawner: tuple[str, ...] = (str(PROGRAMS / "spawner.py"), str(len(actions)))
    if torchrun_on:
        spawner = ("-m", "torch.distributed.run", f"--nproc-per-node={len(actions)}", "--rdzv-backend=static")
        spawner = (*spawner, "--master-addr=127.0.0.1", f"--master-port={torchrun_on}")
    argv = (sys.executable, *spawner, str(PROGRAMS / "worker.py"), str(run_dir.path))
    return Command(argv=argv, env={"LAUNCHER_HOST": "box", "DO": json.dumps(actions), "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def supervise(tmp_path_factory, plan_of):
    """Start runs; in the end nothing of them may be left, and no temporary folder either."""
    with tempfile.TemporaryDirectory(prefix="sup") as scratch:  # a socket's name must be short
        starter = Starter(tmp_path_factory.mktemp("runs"), Path(scratch), plan_of())
        yield starter
        for run in starter.started:
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()
            run.seconds_until_gone()
        for reader in starter.readers:
            reader.wait()
        assert list(Path(scratch).glob("launcher*")) == []
