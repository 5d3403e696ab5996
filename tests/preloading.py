"""Starts of the program without its imports: processes forked from one that has imported torch and Transformers.

    python preloading.py SOCKET_FD MODULES PADDING

``PreloadingProcess`` starts that server and asks it for processes, ``ForkedProcess`` stands for one as ``Popen`` does.
A forked process becomes what ``python -m MODULE …`` would be: arguments, environment (in ``/proc`` as well), folder,
streams, session and signals are those given, its parent and its children are the real ones. It forks the agent, the
launcher of the ranks and the ranks in the same way, wherever it would start ``python -m`` of ``FORKED_MODULES``; all
else is started as always. What starts with an import of torch takes five seconds of a core, a fork some milliseconds.

It also forks for hosts that are namespaces: there ``host_interpreter.py`` asks at an address of ``listen``, and stands
for the forked process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import itertools
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

FORKED_MODULES = (
    "launcher",
    "launcher.doctor.probe",
    "launcher.supervision.agent_entry",
    "launcher.supervision.agent_supervisor",
    "launcher.jobs.torchrun",
    "launcher.jobs.rank",
    "torch.distributed.run",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "launcher.jobs.external_rank",
    "launcher.supervision.external_launcher",
    "launcher.backends.kubernetes.entrypoint",
    "launcher.jobs.export",
    "launcher.jobs.import_gguf",
    "launcher.api.starter",
)
"""Modules whose processes are forked."""

FORKED_BY_RANKS = ("launcher.benchmarks.isolated", "launcher.inference.server.replica")
"""Forked by a rank without a second thread, which a fork would lose."""

FORKED_PROGRAMS = "programs"
"""Name of the folder of programs that are forked too."""

FORKED_SCRIPTS = ("faults_rank.py", "bare_single.py", "hf_trainer.py", "world_of_one.py", "build_memory_rank.py")
"""Of scripts/bench, forked as well."""

_ENV_PYTHON = ["/usr/bin/env", "python"]
"""How an agent of W&B starts a run; tests put the folder of their own Python first in PATH."""

MODULES = (
    "hydra",
    "matplotlib.backends.backend_agg",
    "launcher.backends.local",
    "launcher.cli.run",
    "launcher.cli.resume",
    "launcher.supervision.session",
    "launcher.supervision.agent_entry",
    "launcher.jobs.torchrun",
    "launcher.jobs.rank",
    "launcher.jobs.registry",
    "launcher.config.snapshot",
    "launcher.training.trainer",
    "launcher.engines.torch",
    "launcher.inference.engine.paged_engine",
    "launcher.profiling.profiler",
    "matplotlib.figure",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "transformers.generation.utils",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
DEEPSPEED_MODULES = (
    "launcher.utils.deepspeed_library",
    "deepspeed.launcher.runner",
    "deepspeed.runtime.zero.stage3",
    "launcher.engines.deepspeed.zero",
)
"""Only for runs with DeepSpeed: it changes torch where it is imported."""

_M_MMAP_THRESHOLD = -3
"""Of malloc.h."""

SUPERVISION_MODULES = (
    "launcher.backends.local",
    "launcher.supervision.agent_entry",
    "launcher.supervision.finalize",
    "launcher.supervision.rank_monitor",
    "launcher.supervision.session",
)
"""For runs whose ranks import no torch."""

_PR_SET_MM, _PR_SET_MM_MAP, _MM_MAP = 35, 14, "=12QIi"
"""Of linux/prctl.h: what tells the kernel where the command line of this process is, as a struct."""

_PADDING = 1 << 16
"""Bytes of an argument that makes room for the environments of forked processes in ``/proc/<pid>/environ``, and of a
buffer for their command lines."""

_OPTIONS = ("-u", "-I", "-P")
"""Options of an interpreter that change nothing for a fork."""


def preloading_modules(kind: str) -> tuple[str, ...]:
    """Return what to import for runs of a kind: ``torch``, ``deepspeed`` or ``supervision``."""
    kinds = {"torch": MODULES, "deepspeed": (*MODULES, *DEEPSPEED_MODULES), "supervision": SUPERVISION_MODULES}
    return kinds[kind]


class PreloadingProcess:
    """The server's side in pytest: forks processes on request; ends with this process, or by ``close``.

    Args:
        modules: imported once.
        log: file for what the server prints.
        env: added to the environment of the server, which libraries read when they are imported.
    """

    def __init__(self, modules: Collection[str], log: Path, *, env: Mapping[str, str]) -> None:
        ours, its = socket.socketpair()
        with log.open("wb") as output, its:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(its.fileno()), ",".join(modules)],
                env={**os.environ, **env, "PADDING": "x" * _PADDING},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(its.fileno(),),
                start_new_session=True,
            )
        self._socket, self._log, self._replies = ours, log, ours.makefile("rb")

    def start(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: IO[Any],
        stderr: IO[Any],
    ) -> ForkedProcess:
        """Fork ``python COMMAND``, which is ``-m`` and a module, or a program, in a session of its own."""
        ours, its = socket.socketpair()
        with its, Path(os.devnull).open() as stdin:
            request = json.dumps({"command": list(command), "cwd": str(cwd), "env": dict(env)}).encode()
            descriptors = [stdin.fileno(), stdout.fileno(), stderr.fileno(), its.fileno()]
            self._socket.sendall(len(request).to_bytes(4, "big"))
            socket.send_fds(self._socket, [b"."], descriptors)
            self._socket.sendall(request)
        return ForkedProcess(int(self._reply()), ours)

    def listen(self, address: Path) -> None:
        """Fork also for the hosts whose interpreters ask at ``address``, the path of a socket to be made."""
        request = json.dumps({"listen": str(address)}).encode()
        self._socket.sendall(len(request).to_bytes(4, "big"))
        with Path(os.devnull).open() as unused:
            socket.send_fds(self._socket, [b"."], [unused.fileno()])
        self._socket.sendall(request)
        self._reply()

    def _reply(self) -> bytes:
        line: bytes = self._replies.readline()
        assert line, f"the preloading process has ended:\n{self._log.read_text()}"
        return line

    def close(self) -> None:
        """End the server; what it has forked must have ended."""
        self._replies.close()
        self._socket.close()
        self._server.wait(60)


class ForkedProcess:
    """One forked process, which is a child of the server: as much of ``Popen`` as tests need."""

    def __init__(self, pid: int, ended: socket.socket) -> None:
        self.pid, self.returncode = pid, None
        self._ended = ended

    returncode: int | None

    def poll(self) -> int | None:
        """Return the exit code once it has ended, negative for a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended."""
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            status = self._ended.recv(16)
            assert status, "the preloading process has ended"
            self.returncode = os.waitstatus_to_exitcode(int(status))
            self._ended.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def serve(connection: socket.socket, modules: Sequence[str]) -> None:
    """Import ``modules``, then fork what is asked for until the other side is closed."""
    registered: list[tuple[Callable[..., object], Any, Any]] = []
    register = atexit.register

    def note(function: Callable[..., object], *args: Any, **kwargs: Any) -> Callable[..., object]:
        registered.append((function, args, kwargs))
        return register(function, *args, **kwargs)

    atexit.register = note
    gc.disable()  # it would take a fifth of the time of the imports
    for module in modules:
        importlib.import_module(module)
    atexit.register = register
    if "transformers" in sys.modules:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("gpt2")  # compiles a thousand patterns, kept for all who load weights
    if "hydra" in sys.modules:
        from launcher.config.compose import compose

        compose(["job.steps=1"])  # what Hydra's parser keeps is half of the time of a composition
    gc.collect()
    gc.freeze()  # else every collection in a child touches, and so copies, all that was imported
    gc.enable()
    kept = _open_descriptors() - {connection.fileno()}
    shown = ctypes.create_string_buffer(_PADDING)
    become = partial(_become, kept=kept, registered=registered, sys_path=list(sys.path), shown=shown)
    _fork_python_modules(become)

    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    children: dict[int, socket.socket] = {}
    listeners: list[socket.socket] = []
    while True:
        ready = select.select([connection, read_fd, *listeners], [], [])[0]
        if read_fd in ready:
            os.read(read_fd, 4096)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError), children.pop(pid) as listener:
                    listener.send(str(status).encode())
        for listener in set(listeners) & set(ready):
            peer, _ = listener.accept()
            if (child := os.fork()) == 0:
                with _InterpreterExit():
                    _fork_on_host(peer, become)
            children[child] = peer
        if connection not in ready:
            continue
        if not (received := _receive_request(connection)):
            return
        request, descriptors = received
        if "listen" in request:
            listeners.append(socket.socket(socket.AF_UNIX))
            listeners[-1].bind(request["listen"])
            listeners[-1].listen(64)
            child = 0
        else:
            *streams, listener_fd = descriptors
            if (child := os.fork()) == 0:
                with _InterpreterExit():
                    os.setsid()
                    os.chdir(request["cwd"])
                    for target, source in enumerate(streams):
                        os.dup2(source, target)
                    become(request["command"], env=request["env"], pass_fds=())
            children[child] = socket.socket(fileno=listener_fd)
            descriptors = streams
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(b"%d\n" % child)


def _receive_request(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return what is asked for and the descriptors with it; None once the other side is closed."""
    if not (size := connection.recv(4, socket.MSG_WAITALL)):
        return None
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 16)
    return json.loads(_receive(connection, int.from_bytes(size, "big"))), descriptors


def _fork_on_host(peer: socket.socket, become: Callable[..., NoReturn]) -> NoReturn:
    """Fork what ``peer`` stands for into the namespaces of its host; end as it does.

    It gets the signals that ``peer`` gets, and dies with it, as if it were that process.
    """
    received = _receive_request(peer)
    assert received is not None
    request, descriptors = received
    streams, (processes, *namespaces) = descriptors[:3], descriptors[3:]
    for descriptor in _open_descriptors() - {0, 1, 2, peer.fileno(), *descriptors}:
        with contextlib.suppress(OSError):  # the one that the list was read with
            os.close(descriptor)
    signal.set_wakeup_fd(-1)
    enter = ctypes.CDLL(None, use_errno=True).setns
    assert enter(processes, 0) == 0, os.strerror(ctypes.get_errno())  # for children only
    if (child := os.fork()) == 0:
        with _InterpreterExit():
            os.setsid()
            for namespace in namespaces:
                assert enter(namespace, 0) == 0, os.strerror(ctypes.get_errno())
            os.chdir(request["cwd"])
            for target, source in enumerate(streams):
                os.dup2(source, target)
            become(request["command"], env=request["env"], pass_fds=())
    for descriptor in descriptors:
        os.close(descriptor)
    ended = os.pidfd_open(child)
    watched: list[Any] = [peer, ended]
    while ended not in select.select(watched, [], [])[0]:
        number = peer.recv(1)
        os.kill(child, number[0] if number else signal.SIGKILL)
        if not number:
            watched.remove(peer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0 and -code in signal.valid_signals():
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _open_descriptors() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += connection.recv(size - len(received))
    return received


def _fork_python_modules(become: Callable[..., NoReturn]) -> None:
    """Have ``subprocess.Popen`` of this process and its forks fork instead of starting an interpreter."""
    start = subprocess.Popen.__init__

    def forking(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        words = list(map(os.fspath, args)) if isinstance(args, (list, tuple)) else []
        if words[:2] == _ENV_PYTHON:
            words = [sys.executable, *words[2:]]
        if not rest and words[:1] == [sys.executable] and options.get("preexec_fn") is None:
            command = _without_options(words[1:])
            env, pass_fds = options.get("env"), options.get("pass_fds", ())
            if _is_forked(command):

                def run() -> NoReturn:
                    with _InterpreterExit():
                        become(words[1:], env=dict(os.environ if env is None else env), pass_fds=pass_fds)
                    raise AssertionError("it has ended")

                options["preexec_fn"] = run  # called last before the new program would start, and does not return
        start(self, args, *rest, **options)

    execute = os.execve

    def becoming(path: str, words: Sequence[str], env: Mapping[str, str]) -> NoReturn:
        if words[0] == sys.executable and _is_forked(_without_options(words[1:])):
            with _InterpreterExit():
                become(words[1:], env=env, pass_fds=())
        execute(path, words, env)

    subprocess.Popen.__init__ = forking  # type: ignore[method-assign]
    os.execve = becoming


def _without_options(command: Sequence[str]) -> list[str]:
    return list(itertools.dropwhile(lambda word: word in _OPTIONS, command))


def _is_forked(command: Sequence[str]) -> bool:
    if command[:1] != ["-m"]:
        program = Path(*command[:1])
        return program.parent.name == FORKED_PROGRAMS or program.name in FORKED_SCRIPTS
    if command[1] in FORKED_BY_RANKS:
        return len(list(Path("/proc/self/task").iterdir())) == 1
    return command[1] in FORKED_MODULES


class _InterpreterExit:
    """Ends this process with what the body comes to, as an interpreter ends after its program."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, frames: Any) -> NoReturn:
        code: object = 0
        if isinstance(error, SystemExit):
            code = error.code
        elif error is not None:
            traceback.print_exception(error)
            code = 1
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 120
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit((code or 0) & 0xFF)  # type: ignore[operator]


def _become(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    pass_fds: Collection[int],
    kept: Collection[int],
    registered: Sequence[tuple[Callable[..., object], Any, Any]],
    sys_path: Sequence[str],
    shown: ctypes.Array[ctypes.c_char],
) -> None:
    """Run a module, code or a program in this fork as in a new interpreter; standard streams and folder are right."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):  # what is ignored stays so
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.disable()
    faulthandler.unregister(signal.SIGUSR2)
    for descriptor in _open_descriptors() - {0, 1, 2, *kept, *pass_fds}:
        with contextlib.suppress(OSError):  # the one that the list was read with
            os.close(descriptor)
    atexit._clear()
    for function, args, kwargs in registered:
        atexit.register(function, *args, **kwargs)
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    _set_environment(env)
    _set_command_line([sys.executable, *command], shown)
    command = _without_options(command)
    for descriptor, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(descriptor, mode, closefd=False, encoding="utf-8", errors=errors)  # noqa: SIM115
        if name == "stderr":
            stream.reconfigure(line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    is_module = command[0] == "-m"
    sys.argv = ["-c"] if command[0] == "-c" else list(command[1:] if is_module else command)
    first = str(Path.cwd() if is_module else Path(sys.argv[0]).parent)
    added = [first] if not is_module or "PYTHONSAFEPATH" not in env else []
    added += filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = list(dict.fromkeys([*added, *sys_path[1:]]))
    if "MALLOC_MMAP_THRESHOLD_" in env:  # read when glibc is loaded
        assert ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, int(env["MALLOC_MMAP_THRESHOLD_"]))
    if "OMP_NUM_THREADS" in env and "torch" in sys.modules:  # read when its library is loaded
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        exec(command[1], {"__name__": "__main__"})
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def _set_environment(env: Mapping[str, str]) -> None:
    """Make ``env`` the environment, also in ``/proc``, where tests and the program look processes up."""
    for name in set(os.environ) - env.keys():
        del os.environ[name]
    os.environ.update(env)  # all are stored again, so that nothing points to where they were
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    text = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in env.items())
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, min(len(text), end - start - 1))


def _set_command_line(words: Sequence[str], shown: ctypes.Array[ctypes.c_char]) -> None:
    """Make ``words`` the command line in ``/proc``, where tests and the program read it; all else stays as it is."""
    text = b"".join(os.fsencode(word) + b"\0" for word in words)[: len(shown)]
    ctypes.memmove(shown, text, len(text))
    fields = dict(enumerate(Path("/proc/self/stat").read_text().rpartition(")")[2].split(), start=3))  # as in proc(5)
    start_code, end_code, stack, start_data, end_data, heap, _, _, *environment = (
        int(fields[number]) for number in (26, 27, 28, 45, 46, 47, 48, 49, 50, 51)
    )
    library = ctypes.CDLL(None)
    library.sbrk.restype = ctypes.c_ulong
    start = ctypes.addressof(shown)
    parts = (start_code, end_code, start_data, end_data, heap, library.sbrk(0), stack, start, start + len(text))
    layout = struct.pack(_MM_MAP, *parts, *environment, 0, 0, -1)
    word = ctypes.c_ulong
    library.prctl(_PR_SET_MM, word(_PR_SET_MM_MAP), layout, word(len(layout)), word(0))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2].split(","))
