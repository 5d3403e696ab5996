"""What every test may use: the program as a real process, and a machine that holds nothing of the user's."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import psutil
import pytest
from filelock import FileLock

from launcher.__main__ import main
from launcher.config.compose import compose
from launcher.config.run import Run
from launcher.planning.planner import LocalFacts, make_plan
from launcher.protocol.native_ops import ops_folder
from launcher.protocol.plan import Host, Plan, RunIdentity

from .helpers import wait_for
from .hosts_lab import fork_on as fork_on  # for the tests of every folder
from .hosts_lab import lab_hosts as lab_hosts
from .hosts_lab import lab_hosts_of_module as lab_hosts_of_module
from .markers import MARKERS, holds_only_others, mark, refusing_processes
from .preloading import PreloadingProcess, preloading_modules
from .processes import kill_marked, marked, marked_environment, new_mark, wait_for_marked

REPOSITORY = Path(__file__).resolve().parent.parent
_INHERITED = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM)
"""Signals that a process passes on ignored to those it starts, where it ignores them."""
_NOT_THE_TESTS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "COLUMNS", "LINES")
"""Variables that change what is printed; pytest-xdist sets the width of the terminal in its workers."""
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, at an import that collecting the tests already makes

_LONGEST_FIRST = (
    *("test_tutorial.py", "test_main_job.py", "backends/test_deepspeed.py", "backends/test_ssh.py"),
    *("backends/slurm/test_runs.py", "backends/test_unshared.py", "scripts/test_faults.py"),
    "backends/kubernetes/test_runs.py",
    *("engines/test_pipeline.py", "engines/test_parity.py", "engines/test_offload.py", "engines/test_sharding.py"),
    *("benchmarks/test_quantization.py", "scripts/test_gpu_check.py", "jobs/test_adapters.py", "jobs/test_verify.py"),
    *("benchmarks/test_activation.py", "benchmarks/test_lm_eval.py", "scripts/test_serving_soak.py"),
    *("training/test_preemption.py", "training/test_train.py", "training/test_samples.py", "models/test_compiled.py"),
    *("trackers/test_wandb_sweep.py", "jobs/test_serve.py", "jobs/test_quantize.py", "api/test_functions.py"),
    *("checkpoint/foreign/test_programs.py", "plugins/test_hosts.py", "deploy/test_load_balancing.py"),
    *("trackers/test_sidecar.py", "training/test_preferences.py", "jobs/test_generate.py", "jobs/test_export.py"),
    *("inference/server/test_real.py", "profiling/test_profiling.py", "backends/test_fidelity.py"),
    *("engines/test_deepspeed_pipeline.py", "engines/test_half_precision.py", "engines/test_optimizers.py"),
    *("engines/test_adapters.py", "engines/test_packed.py", "benchmarks/test_batching.py"),
    *("benchmarks/test_attention.py", "supervision/test_signals.py", "supervision/test_torchrun.py"),
    *("supervision/test_stall_torch.py", "api/test_notebook.py", "plugins/test_example.py", "jobs/test_evaluate.py"),
    *("backends/test_local.py", "quantization/test_layers.py", "deploy/monitoring/test_prometheus.py"),
    *("training/test_source_losses.py", "inference/test_distributed.py", "inference/test_invariance.py"),
    *("training/test_bad_steps.py", "trackers/test_several.py", "benchmarks/test_serving.py"),
    *("doctor/test_faults.py", "cli/test_logs.py"),
)
"""Files of tests that take longest, by the time of ``pytest --durations 0``."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files without a test of the one marker asked for unread: their imports take seconds."""
    marker = config.option.markexpr
    is_test = collection_path.match("test_*.py") and marker in MARKERS
    return True if is_test and holds_only_others(collection_path, marker) else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Collect tests without collecting garbage, a fifth of the time of the imports; never look at the modules again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test; put the longest files first, so that no worker is left with one when the others are done."""
    for item in items:
        mark(item)
    order = {REPOSITORY / "tests" / name: number for number, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hold a unit test to what its marker says."""
    with refusing_processes(item):
        return (yield)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name every bytes value alike: what holds a time (gzip) would name a test otherwise in each worker."""
    return "bytes" if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def isolated_machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide the user's keys and settings; keep what is slow to make (converted weights) from run to run.

    The cache is pytest's own, so ``pytest --cache-clear`` starts from nothing.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(ops_folder()))  # native ops are the user's: minutes to build
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each that compiles starts a pool that imports torch
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("XDG_CACHE_HOME", str(request.config.cache.mkdir("launcher")))
        for name in list(os.environ):
            if name.startswith(("WANDB_", "LAUNCHER_", "HYDRA_")) or name in _NOT_THE_TESTS:
                patch.delenv(name)
        for number in _INHERITED:  # a shell ignores them for what it starts in the background
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        yield


@pytest.fixture(autouse=True)
def no_signal_is_left_ignored() -> Iterator[None]:
    """Whatever a test starts inherits which signals are ignored or blocked: a test leaves that as it was."""
    before = _signals()
    yield
    assert _signals() == before, "signals are handled, ignored or blocked in another way than before this test"


def _signals() -> tuple[object, ...]:
    return (*(signal.getsignal(number) for number in _INHERITED), signal.pthread_sigmask(signal.SIG_BLOCK, ()))


MadeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Return a folder by its name that a function has filled: once, for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, made = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker in which it failed
                folder.mkdir()
                fill(folder)
                made.touch()
        return folder

    return make


@dataclass(frozen=True)
class Launched:
    """A run of the program that has ended."""

    returncode: int
    stdout: str
    stderr: str
    cwd: Path

    @property
    def output(self) -> str:
        """Everything it printed."""
        return self.stdout + self.stderr

    @property
    def run_dir(self) -> Path:
        """The one run directory it made below ``cwd``."""
        found = [snapshot.parent for snapshot in self.cwd.glob("runs/*/*/run.yaml")]
        assert len(found) == 1, f"expected one run directory, found {found}; the program said:\n{self.output}"
        return found[0]

    def expect(self, returncode: int) -> Launched:
        """Return this run if it ended with ``returncode``; else fail and show what it printed."""
        assert self.returncode == returncode, f"exit code {self.returncode}, not {returncode}:\n{self.output}"
        return self


Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run ``python -m launcher`` with the arguments given, in ``tmp_path``, and check that it leaves no process behind.

    ``command`` replaces ``python -m launcher``; ``env`` is added to the environment; ``timeout`` is in seconds.
    """
    return _launcher(tmp_path, start_interpreter)


@pytest.fixture
def launch_forked(tmp_path: Path, preloading: Start) -> Launch:
    """Do as ``launch`` does, all processes forked from one that has imported torch: for tests of what jobs compute.

    It takes ``kind`` as well (``Preloading``). A module takes this with a fixture ``launch`` of its own that returns
    it.
    """
    return _launcher(tmp_path, preloading)


def _launcher(tmp_path: Path, start_process: Start) -> Launch:
    def start(
        *arguments: str,
        cwd: Path = tmp_path,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
        command: tuple[str, ...] = (sys.executable, "-m", "launcher"),
        **options: Any,
    ) -> Launched:
        mark = new_mark()
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:

            def printed() -> tuple[str, ...]:
                for stream in (stdout, stderr):
                    stream.seek(0)
                return stdout.read(), stderr.read()

            whole = marked_environment(mark, env)
            process = start_process([*command, *arguments], cwd=cwd, env=whole, stdout=stdout, stderr=stderr, **options)
            try:
                process.wait(timeout)
            except BaseException as problem:
                kill_marked(mark)
                process.wait()
                if not isinstance(problem, subprocess.TimeoutExpired):
                    raise
                pytest.fail(f"still running after {timeout} s: {' '.join(arguments)}\n{''.join(printed())}")
            left = wait_for_marked(mark, seconds=10)
            kill_marked(mark)
            assert not left, f"processes left behind: {left}"
            return Launched(process.returncode, *printed(), cwd)

    return start


@pytest.fixture
def launch_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Launch:
    """Run the command line in this process, in ``tmp_path``: for commands that start no process of their own.

    A process costs a second of imports. ``env`` is added to the environment.
    """

    def start(*arguments: str, env: Mapping[str, str] | None = None) -> Launched:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            capsys.readouterr()
            code = main(arguments)
        printed = capsys.readouterr()
        return Launched(code, printed.out, printed.err, tmp_path)

    return start


@pytest.fixture(scope="session")
def nasty_strings() -> tuple[str, ...]:
    """500 strings that shells, JSON and line protocols like to damage; the same at every call."""
    pieces = [
        *("'", '"', "`", "\\", "\\\\", "\\n", "$HOME", "${HOME}", "$(id)", "$$", "\x60id\x60", "%n", "%h", "%s", "%%"),
        *("\n", "\r\n", "\t", " ", "   ", "\x01", "\x1b[31m", "\x7f", "\u2028", "\ufeff", "\u0085"),
        *("{a,b}", "{0}", "[x]", "*", "?", "~", "~root", "!", "!!", "#", ";", "&&", "|", "<", ">", "(", ")", "^", "="),
        *("--", "-n", "-o ProxyCommand=id", "@", ":", ",", "a", "Z", "0", "null"),
        *("é", "漢字", "🧪", "e\u0301", "\u202eabc"),
    ]
    generator = random.Random(20260101)
    return tuple("".join(generator.choices(pieces, k=1 + number % 12)) for number in range(500))


BOX = Host(name="box", slots=2, cores=4, memory_bytes=16 * 2**30)
IDENTITY = RunIdentity(run_id="20260101-120000-abcd", run_dir="/runs/x", run_hash="ab" * 32, port=29500)
PlanOf = Callable[..., Plan]


def composed_run(*words: str) -> Run:
    """Return the run that ``words`` compose, which tests share: it takes a tenth of a second."""
    return _composed_run(words, Path.cwd())


@functools.cache
def _composed_run(words: tuple[str, ...], _folder: Path) -> Run:
    return compose(words).run


@pytest.fixture(scope="session")
def plan_of() -> PlanOf:
    """Compose overrides and plan them on hosts and with facts that are the same everywhere."""

    def plan(*words: str, hosts: Sequence[Host] = (BOX,), missing_ops: Sequence[str] = (), **environ: str) -> Plan:
        facts = LocalFacts(environ=environ, home=Path("/home/me"), ops_folder="/ops", missing_ops=tuple(missing_ops))
        return make_plan(composed_run(*words), hosts, IDENTITY, facts)

    return plan


class Background:
    """A run of the program that has not ended yet; what it prints goes into a file."""

    def __init__(self, process: Started, mark: str, printed: Path) -> None:
        self._process, self._printed, self.mark = process, printed, mark

    @property
    def output(self) -> str:
        """Return what it has printed so far."""
        return self._printed.read_text(errors="replace")

    def wait_for_output(self, text: str) -> None:
        """Wait until a line holds ``text``; fail when the program ends without it."""

        def has_text() -> bool:
            return text in self.output.rpartition("\n")[0]

        wait_for(has_text, seconds=math.inf, process=self._process, shown=lambda: f"no {text!r} in {self.output}")

    def send_signal(self, number: int) -> None:
        """Send a signal to the launcher alone."""
        self._process.send_signal(number)

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the rank processes by number: the child of each rank monitor."""
        pairs = [process for process in marked(self.mark) if "RANK" in process.environ()]
        monitors = {process.pid for process in pairs}
        return {int(process.environ()["RANK"]): process for process in pairs if process.ppid() in monitors}

    def wait(self, *, timeout: float = 60) -> int:
        """Return the exit code, once everything of the run is gone."""
        code = self._process.wait(timeout)
        left = wait_for_marked(self.mark, seconds=30)
        assert not left, f"processes left behind: {left}"
        return code


@pytest.fixture
def launch_in_background(tmp_path: Path) -> Iterator[Callable[..., Background]]:
    """Start ``python -m launcher`` with the arguments given, in ``tmp_path``; whatever is left is killed in the end."""
    with running_in_background(tmp_path, start_interpreter) as start:
        yield start


@pytest.fixture
def launch_forked_in_background(tmp_path: Path, preloading: Start) -> Iterator[Callable[..., Background]]:
    """Do as ``launch_in_background`` does, all processes forked as those of ``launch_forked``."""
    with running_in_background(tmp_path, preloading) as start:
        yield start


@contextlib.contextmanager
def running_in_background(tmp_path: Path, start_process: Start) -> Iterator[Callable[..., Background]]:
    """Give what starts ``python -m launcher`` in ``tmp_path`` by ``start_process``; kill what is left in the end."""
    started: list[Background] = []
    with tempfile.TemporaryDirectory() as folder:

        def start(*arguments: str) -> Background:
            mark, printed = new_mark(), Path(folder) / str(len(started))
            env = marked_environment(mark)
            with printed.open("wb") as output:
                command = [sys.executable, "-m", "launcher", *arguments]
                process = start_process(command, cwd=tmp_path, env=env, stdout=output, stderr=output)
            started.append(Background(process, mark, printed))
            return started[-1]

        yield start
        for running in started:
            kill_marked(running.mark)
            running.wait()


class Started(Protocol):
    """A process that a test has started."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Return the exit code once it has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended."""

    def send_signal(self, number: int) -> None:
        """Send it a signal."""

    def kill(self) -> None:
        """Kill it."""


Start = Callable[..., Started]


def start_interpreter(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: IO[Any], stderr: IO[Any]
) -> Started:
    """Start a program in a session of its own, with nothing to read."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
    return subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **streams)


class Preloading:
    """Start programs as ``start_interpreter`` does, forked from one that has imported torch (preloading.py).

    ``kind`` is one of ``preloading_modules``; without it the words of the command decide.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: dict[str, PreloadingProcess] = {}
        self._lock = threading.Lock()

    def __call__(self, command: Sequence[str], *, kind: str | None = None, **options: Any) -> Started:
        """Fork ``command``; the options are those of ``start_interpreter``."""
        assert command[0] == sys.executable
        kind = kind or ("deepspeed" if any("zero" in str(word) for word in command) else "torch")
        with self._lock:
            return self._server(kind).start(command[1:], **options)

    def listen(self, address: Path, *, kind: str) -> None:
        """Fork also for the hosts whose interpreters ask at ``address``."""
        with self._lock:
            self._server(kind).listen(address)

    def close(self) -> None:
        """End the processes forked from; what they have forked must have ended."""
        for server in self._servers.values():
            server.close()

    def _server(self, kind: str) -> PreloadingProcess:
        if kind not in self._servers:
            env = {"DS_ACCELERATOR": "cpu"} if kind == "deepspeed" else {}
            self._servers[kind] = PreloadingProcess(preloading_modules(kind), self._folder / kind, env=env)
        return self._servers[kind]


@pytest.fixture(scope="session")
def preloading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preloading]:
    """Start programs forked from one that has imported torch."""
    made = Preloading(tmp_path_factory.mktemp("preloading"))
    yield made
    made.close()


RunProgram = Callable[..., str]


@pytest.fixture(scope="session")
def run_forked_program(preloading: Start, tmp_path_factory: pytest.TempPathFactory) -> RunProgram:
    """Run a Python program, or a module by its name, forked from what has imported torch; return what it printed."""

    def run(
        program: Path | str,
        *arguments: str,
        cwd: Path | None = None,
        timeout: float = 500,
        kind: str | None = None,
        **environ: str,
    ) -> str:
        folder = tmp_path_factory.mktemp("program")
        output, errors = folder / "stdout", folder / "stderr"
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            command = [sys.executable, *(["-m"] if isinstance(program, str) else []), str(program), *arguments]
            env = {**os.environ, **environ}
            process = preloading(command, kind=kind, cwd=cwd or folder, env=env, stdout=stdout, stderr=stderr)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        assert code == 0, output.read_text() + errors.read_text()
        return output.read_text()

    return run
