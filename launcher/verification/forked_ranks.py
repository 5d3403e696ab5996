"""Run work in forks of all ranks, with a process group each and a rendezvous by files."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import JobError
from launcher.protocol.heartbeat import Heartbeat
from launcher.utils.files import read_json, write_json
from launcher.utils.processes import die_with_parent, signal_name
from launcher.utils.system import free_port

if TYPE_CHECKING:
    from launcher.config.run import Run
    from launcher.engines.context import Context


CaseAnswer = dict[str, Any]
ERROR_KEY = "error"
"""Key of the error in an answer."""
TIME_KEY = "time"
"""Key of its time, in seconds since 1970."""
_POLL_S = 0.1
_STACK_DUMP_S = 0.5
"""Time between asking a hung process for its stacks, which go into the log, and ending it."""


def run_in_fork(
    work: Callable[[], CaseAnswer],
    answer: Path,
    *,
    limit_s: float,
    heartbeat: Callable[[], None],
    give_up: Callable[[], str],
) -> None:
    """Run ``work`` in a forked process and wait for it; ``answer`` is always written.

    Args:
        work: done in the child, where nothing of it is kept but what it returns.
        answer: gets what ``work`` returns as JSON, or an object with ``TROUBLE`` and ``AT``.
        limit_s: after which the child is killed.
        heartbeat: called all the while.
        give_up: asked all the while; a reason ends the child.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with_parent(parent)
        _run_child(work, answer)
    deadline = time.monotonic() + limit_s
    error = ""
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        heartbeat()
        error = give_up() or (f"was not done after {limit_s:g} s" if time.monotonic() > deadline else "")
        if error:
            failed_at = time.time()  # before the ranks that lose their connection to this child fail
            ended = _kill_with_stacks(child)
            break
        time.sleep(_POLL_S)
    else:
        failed_at = time.time()
    if not answer.exists():
        write_json(answer, {ERROR_KEY: error or f"ended by {_exit_text(ended[1])}", TIME_KEY: failed_at})


def _run_child(work: Callable[[], CaseAnswer], answer: Path) -> None:
    """Do the work and end this process, without any of the parent's own clearing up."""
    code = 0
    try:
        write_json(answer, work())
    except BaseException as error:  # noqa: BLE001 (a strategy that fails is a result, whatever it raises)
        traceback.print_exc()
        words = " ".join("".join(traceback.format_exception_only(error)).split())  # one line of a table
        write_json(answer, {ERROR_KEY: words, TIME_KEY: time.time()})
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill_with_stacks(child: int) -> tuple[int, int]:
    os.kill(child, signal.SIGUSR2)  # not waited for yet, so the number is still its own
    time.sleep(_STACK_DUMP_S)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)


def _exit_text(status: int) -> str:
    return signal_name(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"


_FINISHED = "left"
_FAILURE_GRACE_S = 5.0
"""Time that a rank has to fail on its own once another has failed: its reason may say more."""


@dataclass(frozen=True)
class FileRendezvous:
    """A folder that all ranks see.

    Args:
        folder: of this attempt at the run.
        rank: this one.
        heartbeat: called while waiting.
    """

    folder: Path
    rank: int
    heartbeat: Callable[[], None]

    @property
    def reference(self) -> Path:
        """The final weights of one process."""
        return self.folder / "reference.safetensors"

    def answer_of(self, name: str, rank: int) -> Path:
        """Return the file with the answer of ``rank`` in case ``name``."""
        return self.folder / f"{name}.{rank}.json"

    def agree_on_port(self, name: str, *, limit_s: float) -> int:
        """Return the port where a case's ranks meet: rank 0 finds a free one, the others wait.

        Raises:
            JobError: rank 0 names none in time.
        """
        file = self.folder / f"{name}.port.json"
        if self.rank == 0:
            write_json(file, {"port": free_port()})
        deadline = time.monotonic() + limit_s
        while not file.exists():
            self.heartbeat()
            if time.monotonic() > deadline:
                raise JobError(
                    f"rank {self.rank} saw no {file} in {limit_s:g} s: set run.root to a folder that all hosts share"
                )
            time.sleep(_POLL_S)
        port: int = read_json(file)["port"]
        return port

    def failure_watcher(self, name: str, *, world_size: int) -> Callable[[], str]:
        """Return a function that names the rank that failed in case ``name``.

        It is asked once this rank had time to fail too.
        """
        others = {rank: self.answer_of(name, rank) for rank in range(world_size) if rank != self.rank}
        failed: dict[int, float] = {}

        def give_up() -> str:
            for rank in [rank for rank, file in others.items() if file.exists()]:
                if ERROR_KEY in read_json(others.pop(rank)):
                    failed[rank] = time.monotonic()
            first = min(failed, key=failed.__getitem__, default=None)
            late = first is not None and time.monotonic() > failed[first] + _FAILURE_GRACE_S
            return f"ended because rank {first} had failed" if late else ""

        return give_up

    def collect(self, name: str, *, world_size: int, limit_s: float) -> dict[int, CaseAnswer]:
        """Return the answers of all ranks; those that send none within ``limit_s`` have an error."""
        deadline = time.monotonic() + limit_s
        found: dict[int, CaseAnswer] = {}
        while len(found) < world_size and time.monotonic() < deadline:
            self.heartbeat()
            for rank in range(world_size):
                file = self.answer_of(name, rank)
                if rank not in found and file.exists():
                    found[rank] = read_json(file)
            time.sleep(_POLL_S)
        silent = {ERROR_KEY: f"did not answer within {limit_s:g} s of rank 0", TIME_KEY: time.time()}
        return {rank: found.get(rank, silent) for rank in range(world_size)}

    def finish(self, *, world_size: int, limit_s: float) -> None:
        """Record that this rank has finished; rank 0 removes the folder once all ranks have.

        A rank still waits for its fork when the answer of that is there already.
        """
        write_json(self.answer_of(_FINISHED, self.rank), {})
        if self.rank == 0 and not any(
            ERROR_KEY in answer for answer in self.collect(_FINISHED, world_size=world_size, limit_s=limit_s).values()
        ):
            shutil.rmtree(self.folder)
            if not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()


WAIT_SLACK_S = 60.0
"""Between ranks that wait for each other, besides the time of a case."""


@dataclass
class ForkedRanks:
    """Runs cases on forks of the ranks; all ranks run the same cases in the same order.

    Args:
        context: of this rank in the run.
        folder: name of the one in the run directory by which ranks tell each other where a case meets, and its outcome.
        limit_s: time that a case gets.
        heartbeat: called while this rank waits.
    """

    context: Context
    _: KW_ONLY
    folder: str
    limit_s: float
    heartbeat: Callable[[], None]

    def __post_init__(self) -> None:
        folder = self.context.run_dir.path / self.folder / os.environ["MASTER_PORT"]  # another attempt has another port
        folder.mkdir(parents=True, exist_ok=True)
        self.rendezvous = FileRendezvous(folder, self.context.rank, self.heartbeat)
        self._num_skipped = 0

    def run_case(
        self, name: str, work: Callable[[Context], CaseAnswer], *, run: Run, world_size: int
    ) -> dict[int, CaseAnswer]:
        """Run ``work`` on the first ``world_size`` ranks; return the answers on rank 0, else {}.

        A rank that fails, dies or is late answers with ``ERROR_KEY``; then so do the others.

        Args:
            name: of the case; no two have the same.
            work: done in the fork, with the context it has there.
            run: of that context.
            world_size: of that context.
        """
        if self.context.rank >= world_size:
            self._num_skipped += 1
            return {}
        timeout_s = (2 + self._num_skipped) * (self.limit_s + WAIT_SLACK_S)
        self._num_skipped = 0
        port = self.rendezvous.agree_on_port(name, limit_s=timeout_s)
        context = replace(self.context, run=run, world_size=world_size, heartbeat=Heartbeat(None))  # the parent beats

        def work_in_group() -> CaseAnswer:
            from launcher.engines.distributed import use_master_port

            use_master_port(port, world_size=world_size)
            return work(context)

        run_in_fork(
            work_in_group,
            self.rendezvous.answer_of(name, self.context.rank),
            limit_s=self.limit_s,
            heartbeat=self.heartbeat,
            give_up=self.rendezvous.failure_watcher(name, world_size=world_size),
        )
        if not self.context.is_main:
            return {}
        return self.rendezvous.collect(name, world_size=world_size, limit_s=WAIT_SLACK_S)

    def finish(self) -> None:
        """Record that this rank has finished; the folder is removed once all ranks have."""
        self.rendezvous.finish(world_size=self.context.world_size, limit_s=WAIT_SLACK_S)


_TORCH_MODULES = (
    "launcher.verification.run_case",
    "launcher.engines.torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.generation.utils",
    "transformers.integrations",
)

_DEEPSPEED_MODULES = (
    "launcher.utils.deepspeed_library",
    "launcher.engines.deepspeed.zero",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.moe.layer",
    "torch._inductor.compile_fx",
)


def preload_modules(context: Context, *, deepspeed: bool) -> None:
    """Import what the cases need and lay the model out once, without touching a GPU.

    A process that has touched a GPU cannot be forked.

    Args:
        context: of this rank in the run.
        deepspeed: whether some case is DeepSpeed's.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    _import_all(_TORCH_MODULES, context)
    if deepspeed:
        import torch

        from launcher.engines.deepspeed.base import prepare_environment

        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        prepare_environment(context)
        _import_all(_DEEPSPEED_MODULES, context)
    from launcher.models.build import build_deferred

    run = context.run
    build_deferred(
        run.model, seed=run.job.seed, attention=run.attention, heartbeat=lambda: context.heartbeat.update("load")
    )


def _import_all(names: tuple[str, ...], context: Context) -> None:
    for name in names:
        context.heartbeat.update("load")
        importlib.import_module(name)
