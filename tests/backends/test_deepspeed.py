"""The deepspeed backend: what it hands to the real command, and real runs on hosts that are namespaces."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.backends.deepspeed import DeepspeedExecutor
from launcher.config.backend import deepspeed as backend
from launcher.config.backend.deepspeed import DeepspeedBackend
from launcher.errors import ConfigError, ConfigErrors
from launcher.protocol.plan import Host
from launcher.protocol.rundir import RunDir, decode_run_dir, encode_run_dir
from launcher.utils.system import code_root
from tests.conftest import Background, Launch, Start
from tests.helpers import wait_for
from tests.hosts_lab import ForkOn
from tests.processes import left_after, marked_environment, new_mark
from tests.torchless import ECHO, endless, wait_for_answers

from .contract import SMALL, Ended, ForkedBackendContract

HOSTS = (
    Host(name="node1", slots=2, ssh_destination="node1", address="node1", python="python"),
    Host(name="node2", slots=1, ssh_destination="ada@node2", address="node2", python="python"),
)
MLFLOW = [str(Path(str(found.origin)).parent) for found in [find_spec("mlflow")] if found is not None]
"""Folders that are hidden from all programs of these runs: DeepSpeed imports mlflow wherever it is, for seconds."""
HIDDEN = [["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', folder] for folder in MLFLOW]
PROGRAM = (*(word for words in HIDDEN for word in words), sys.executable, "-m", "launcher")
TINY = ("model=gpt2_tiny", "data=synthetic", "tracker=local")


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make programs that are there, and no others; the checkout may have any path, which some runners refuse."""
    for module in ("config.backend.deepspeed", "backends.deepspeed"):
        monkeypatch.setattr(f"launcher.{module}.code_root", lambda: Path("/code"))
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")

    def put(*names: str) -> None:
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return put


def refusals(made: DeepspeedBackend, hosts: Sequence[Host] = HOSTS) -> list[str]:
    return [str(error) for error in made.validate_hosts(hosts)]


def test_the_submission_is_shown_whole(plan_of: Any, on_path: Any) -> None:
    on_path("pdsh")
    plan = plan_of(
        *TINY, "backend=deepspeed", hosts=HOSTS, HF_TOKEN="hf_secret", WANDB_API_KEY="key", NCCL_DEBUG="INFO"
    )
    options = "-o BatchMode=yes -o ControlPath=none -o ClearAllForwardings=yes"
    assert DeepspeedExecutor(DeepspeedBackend()).render(plan, snapshot="").splitlines() == [
        "export PYTHONPATH=/code",
        "export PDSH_RCMD_TYPE=ssh",
        f"export PDSH_SSH_ARGS_APPEND='{options}'",
        "cd /code",
        "/venv/bin/python -m deepspeed.launcher.runner --hostfile /runs/x/hostfile --launcher pdsh --force_multi "
        "--no_ssh_check --no_local_rank --master_addr node1 --master_port 29500 --module launcher.jobs.external_rank "
        "dir.L3J1bnMveA==",
        "# /runs/x/hostfile:",
        "node1 slots=2",
        "ada@node2 slots=1",
        "# channel/start.json in the run directory: folder and environment for the ranks, without secrets",
        "# forwarded: NCCL_DEBUG",
        "# HF_TOKEN will not reach the hosts: deepspeed can only send them in command lines. "
        "Log in on the hosts (hf auth login), or set backend=ssh",
    ]


@pytest.mark.parametrize(
    ("runner", "package"), [("pdsh", "pdsh"), ("openmpi", "openmpi-bin"), ("slurm", "slurm-client")]
)
def test_a_runner_that_is_not_installed_is_refused_with_what_to_install(
    runner: Any, package: str, on_path: Any
) -> None:
    on_path()
    hosts = (Host(name="node1", slots=1, ssh_destination="node1"),)
    (said,) = refusals(DeepspeedBackend(runner=runner), hosts)
    assert said.startswith(f"backend.runner={runner}: ")
    assert f"apt install {package}" in said


@pytest.mark.parametrize(
    ("runner", "login"),
    [("pdsh", "node1:2222"), ("pdsh", "[fd00::1]"), ("openmpi", "ada@node1"), ("slurm", "ada@node1")],
)
def test_logins_that_a_runner_has_no_word_for_are_refused(runner: Any, login: str, on_path: Any) -> None:
    on_path("pdsh", "mpirun", "srun")
    (said,) = refusals(DeepspeedBackend(runner=runner), (Host(name="node1", slots=1, ssh_destination=login),))
    assert f"{runner} cannot reach {login}" in said


def test_paths_that_remote_shells_would_take_apart_are_refused(monkeypatch: pytest.MonkeyPatch, on_path: Any) -> None:
    on_path("pdsh")
    monkeypatch.setattr("launcher.config.backend.deepspeed.code_root", lambda: Path("/my code"))
    (said,) = refusals(DeepspeedBackend())
    assert "does not quote the path of the program (/my code)" in said


def test_what_deepspeed_has_no_way_to_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        DeepspeedBackend(agent="torchrun", python="/other/python", min_hosts=1, ssh_config=str(tmp_path / "a b"))
    options = {error.option for error in caught.value.errors}
    assert options == {"backend.agent", "backend.python", "backend.min_hosts", "backend.ssh_config"}


def test_a_configuration_of_ssh_that_is_not_there_is_refused(tmp_path: Path, on_path: Any) -> None:
    on_path("pdsh")
    (said,) = refusals(DeepspeedBackend(ssh_config=str(tmp_path / "none")))
    assert said.endswith("none: no such file; leave it out to use ~/.ssh/config")


def test_a_missing_hostfile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backend\.hostfile"):
        DeepspeedBackend(hostfile=str(tmp_path / "none")).hosts(max_ranks=None)


def test_any_run_directory_becomes_a_word_that_no_shell_minds(nasty_strings: tuple[str, ...]) -> None:
    for text in nasty_strings:
        folder = "/" + text.replace("\0", "")
        assert str(decode_run_dir(encode_run_dir(folder)).path) == str(Path(folder))
        assert re.fullmatch(r"[A-Za-z0-9_.=-]+", encode_run_dir(folder))


class Run(Background):
    """A run of the program on the hosts of a lab, and every process of it, wherever it is."""

    def __init__(self, lab: Any, cwd: Path, printed: Path, *words: str, start_process: Start, **env: str) -> None:
        self.lab, self.cwd, mark = lab, cwd, new_mark()
        command = [sys.executable, "-m", "launcher", "backend=deepspeed", "backend.heartbeat_timeout_s=6", *words]
        command += [f"backend.hostfile={lab.hostfile}", f"backend.ssh_config={lab.ssh_config}"]
        with printed.open("wb") as output:
            self.process = start_process(
                command, cwd=cwd, env=marked_environment(mark, env), stdout=output, stderr=output
            )
        super().__init__(self.process, mark, printed)
        self.root = psutil.Process(self.process.pid)

    @property
    def run_dir(self) -> Path:
        (found,) = self.cwd.glob("runs/*/*")
        return found

    def end(self, timeout: float = 120) -> int:
        """Return the exit code; processes on hosts may still be there."""
        return self.process.wait(timeout)

    def of_here(self, text: str) -> psutil.Process:
        """Return the process of this machine whose command line holds ``text``."""
        return next(child for child in self.root.children(recursive=True) if text in _command(child))

    def of_hosts(self) -> dict[int, str]:
        """Return what runs for this run on the hosts: ranks, rank monitors, and their launchers."""
        word = encode_run_dir(str(self.run_dir))
        found = {pid: line for name in self.lab.names for pid, line in self.lab.processes(name).items() if word in line}
        return {pid: line for pid, line in found.items() if "ssh" not in line.split()[0]}

    def survivors(self, seconds: float) -> list[str]:
        """Return what is still there once ``seconds`` have passed; empty as soon as nothing is."""
        word = encode_run_dir(str(self.run_dir))
        return left_after(
            lambda: [line for line in map(_command, psutil.process_iter()) if word in line], seconds=seconds
        )


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def plain_lab(lab_hosts_of_module: Any) -> Any:
    for path in (str(code_root()), sys.executable):
        if not backend._SAFE.fullmatch(path):
            pytest.skip(f"the backend refuses this checkout: deepspeed cannot pass {path} to hosts")
    lab = lab_hosts_of_module(2)
    for name, folder in itertools.product(lab.names, MLFLOW):
        hidden = lab.run(name, ["mount", "-t", "tmpfs", "none", folder])
        assert hidden.returncode == 0, hidden.stderr
    return lab


@pytest.fixture
def lab(plain_lab: Any, fork_on: ForkOn) -> Any:
    """Those hosts, where interpreters are forked: the first test of the contract starts them without forks."""
    fork_on(plain_lab, kind="deepspeed")
    return plain_lab


@pytest.fixture
def start(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, preloading: Start) -> Iterator[Callable[..., Run]]:
    """Start runs, forked; whatever is left of one is killed in the end."""
    started: list[Run] = []
    start_process = partial(preloading, kind="deepspeed")

    def begin(lab: Any, *words: str, **env: str) -> Run:
        printed = tmp_path_factory.mktemp("printed") / "output"
        started.append(Run(lab, tmp_path, printed, *words, start_process=start_process, **env))
        return started[-1]

    yield begin
    for run in started:
        if run.process.poll() is None:
            for child in [*run.root.children(recursive=True), run.root]:
                child.kill()
        run.process.wait()


class TestContract(ForkedBackendContract):
    @pytest.fixture
    def words(self, tmp_path: Path, on_path: Any) -> tuple[str, ...]:
        on_path("pdsh")
        (tmp_path / "hosts").write_text("node1 slots=1\nada@node2 slots=1\n")
        return ("backend=deepspeed", f"backend.hostfile={tmp_path}/hosts")

    @pytest.fixture
    def run(self, plain_lab: Any, launch: Launch) -> Callable[..., Ended]:
        return self.starting(partial(launch, command=PROGRAM), plain_lab)

    @pytest.fixture
    def failing_run(self, lab: Any, launch_forked: Launch) -> Callable[..., Ended]:
        return self.starting(partial(launch_forked, kind="deepspeed"), lab)

    def starting(self, launch: Launch, lab: Any) -> Callable[..., Ended]:
        chosen = ("backend=deepspeed", f"backend.hostfile={lab.hostfile}", f"backend.ssh_config={lab.ssh_config}")

        def start(*more: str) -> Ended:
            ended = launch(*SMALL, *chosen, *more)
            return ended.returncode, ended.output, RunDir(ended.run_dir)

        return start

    @pytest.fixture
    def left(self, plain_lab: Any) -> Callable[[], object]:
        return lambda: {name: found for name in plain_lab.names if (found := plain_lab.processes(name))}


def test_runs_with_pdsh_in_a_directory_that_shells_would_take_apart(lab: Any, start: Any, tmp_path: Path) -> None:
    values = {"NCCL_ODD": 'a "b" $HOME `id` \\ {x,y} %n é', "HF_TOKEN": "hf_0123456789secret", "UCX_ODD": "$(id)"}
    values["LAUNCHER_PLUGIN_PATH"] = str(tmp_path / "plugins")
    folder = tmp_path / "it's a $HOME `dir`"
    run = start(lab, *ECHO, "job.echo_step_s=0.05", f"run.dir={json.dumps(str(folder))}", **values)
    wait_for((folder / "generated" / "rank1.part").exists)
    lines = [_command(process) for process in psutil.process_iter()]
    assert run.end() == 0, run.output
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert [path.name for path in sorted((folder / "logs").glob("node*.log"))] == ["node1.0.log", "node2.1.log"]
    sent = json.loads((folder / "channel" / "start.json").read_text())
    assert (sent["cwd"], sent["env"]["NCCL_ODD"]) == (str(tmp_path), values["NCCL_ODD"])
    assert sent["env"]["LAUNCHER_PLUGIN_PATH"] == values["LAUNCHER_PLUGIN_PATH"]
    assert "HF_TOKEN will not reach the hosts" in run.output
    secret = values["HF_TOKEN"]
    assert not any(secret in line for line in lines)
    assert not any(secret.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert not any(values["NCCL_ODD"] in line or "$(id)" in line for line in lines)  # deepspeed had nothing to export


FAULTS = {
    "rank": (137, r"rank \d on node\d was ended by signal 9 \(SIGKILL\)"),
    "launcher of a host": (1, r"the launcher of the ranks on node\d was killed"),
    "pdsh": (1, r"deepspeed ended with exit code 0 before rank 0 on node1 and 1 on node2 did"),
    "deepspeed": (137, r"deepspeed on \S+ was ended by signal 9 \(SIGKILL\)"),
    "agent": (137, r"the host agent on \S+ was ended by signal 9 \(SIGKILL\)"),
    "parent": (-9, ""),
}


@pytest.mark.parametrize("victim", FAULTS)
def test_no_process_is_left_and_the_cause_is_named(victim: str, lab: Any, start: Any, tmp_path: Path) -> None:
    run = start(lab, *endless(tmp_path))
    run.wait_for_output("run directory: ")
    wait_for_answers(run.run_dir)
    on_hosts = run.of_hosts()
    if victim == "rank":
        os.kill(max(pid for pid, line in on_hosts.items() if "-m launcher.jobs.external_rank" in line), signal.SIGKILL)
    elif victim == "launcher of a host":
        os.kill(next(pid for pid, line in on_hosts.items() if "-m deepspeed.launcher.launch" in line), signal.SIGKILL)
    elif victim == "parent":
        run.process.kill()
    else:
        text = {"pdsh": "pdsh -S", "deepspeed": "deepspeed.launcher.runner", "agent": "supervision.external_launcher"}[
            victim
        ]
        run.of_here(text).kill()
    code, reason = FAULTS[victim]
    assert run.end() == code, run.output
    assert run.survivors(20) == []
    assert re.search(f"exit code \\d+: {reason}" if reason else "", run.output), run.output


def test_a_host_that_loses_its_power_is_named(lab_hosts: Any, fork_on: ForkOn, start: Any, tmp_path: Path) -> None:
    lab = lab_hosts(2, prefix="dark")
    fork_on(lab, kind="deepspeed")
    run = start(lab, *endless(tmp_path))
    run.wait_for_output("run directory: ")
    wait_for_answers(run.run_dir)
    lab.power_off("dark2")
    assert run.end() == 1
    assert ": no heartbeat from dark2 for" in run.output.splitlines()[-1]
    assert run.survivors(20) == []


def test_ranks_that_are_asked_to_save_and_go_are_continued_later(lab: Any, start: Any) -> None:
    run = start(lab, *TINY, "job.steps=100000", "checkpoint=frequent")
    run.wait_for_output("step 1/")
    run.process.send_signal(signal.SIGUSR1)
    assert run.end() == 75, run.output
    assert list((run.run_dir / "checkpoints").glob("step_*/manifest.json"))
    assert run.survivors(20) == []


def test_runs_with_openmpi(lab: Any, start: Any, tmp_path: Path) -> None:
    if backend.shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (apt: openmpi-bin)")
    run = start(lab, *ECHO, "backend.runner=openmpi")
    assert run.end() == 0, run.output
    assert [path.name for path in sorted((run.run_dir / "logs").glob("node*.log"))] == ["node1.0.log", "node2.1.log"]
    assert run.survivors(20) == []
