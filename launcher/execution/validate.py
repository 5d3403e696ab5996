"""Checks of this machine's disk, ports and limits before anything is started."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.checkpoint.foreign.plan import describe_foreign, foreign_to_resume, validate_foreign
from launcher.checkpoint.resume import (
    data_warnings,
    describe_resume,
    find_checkpoint,
    lr_jump_warning,
    validate_resume,
)
from launcher.checkpoint.store import silent
from launcher.config.backend.base import Backend
from launcher.config.backend.containers import validate_mounted
from launcher.config.job.compression import CompressionJob
from launcher.config.job.generate import Generate
from launcher.config.job.generating import GeneratingJob
from launcher.config.job.sparsify import Sparsify
from launcher.config.job.train import Train
from launcher.config.parallel.zero import Zero
from launcher.config.run import BatchedJob, Run
from launcher.config.snapshot import read_snapshot
from launcher.config.validate import validate_adapter_on_quantized, validate_quantized_weights
from launcher.errors import ConfigError
from launcher.execution.validate_inputs import validate_inputs, validate_resumed_tokenizer
from launcher.planning.planner import estimate_memory
from launcher.protocol.plan import Host
from launcher.protocol.rundir import RunDir
from launcher.runs.checkpoints import kept_checkpoints
from launcher.utils.files import read_object
from launcher.utils.text import bytes_text

_CAP_IPC_LOCK = 14
"""Number of Linux's capability to lock any amount of memory."""


def validate_machine(run: Run, run_dir: Path, *, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """Yield every reason on this machine why ``run`` cannot start on ``hosts``.

    On Kubernetes, paths, packages and ports are those of the pods: only the run directory is checked here, and the
    first pod checks the rest before any rank starts.
    """
    yield from _validate_unwritable("run.dir" if run.run.dir else "run.root", run_dir)
    yield from validate_run_dir(run, RunDir(run_dir))
    if run.backend.sees_files_of_hosts(str(run_dir)):
        yield from _validate_on_host(run, run_dir, hosts=hosts)


def _validate_on_host(run: Run, run_dir: Path, *, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    yield from run.job.validate_machine(run, RunDir(run_dir))
    yield from run.tracker.validate_machine()
    if (
        isinstance(run.job, Generate | CompressionJob)
        and run.job.output is not None
        and not Path(run.job.output).exists()
    ):
        yield from _validate_unwritable("job.output", Path(run.job.output).absolute())
    yield from _validate_quantization(run)
    if isinstance(run.job, BatchedJob) and run.job.trains:
        yield from run.optimizer.validate_machine()
    yield from validate_inputs(run, RunDir(run_dir), hosts=hosts)
    if isinstance(run.job, BatchedJob) and run.job.resumes:
        yield from _validate_checkpoint(run, RunDir(run_dir), world_size=sum(host.slots for host in hosts))
    if isinstance(run.job, BatchedJob | GeneratingJob):
        yield from _validate_missing_tools(run, hosts)
    yield from _validate_taken_port(run.backend)
    if getattr(run.backend, "container", "none") != "none":
        here = ("the working directory", str(Path.cwd()))
        yield from validate_mounted([("run.dir", str(run_dir)), here, *run.paths()])
    if isinstance(run.parallel, Zero) and run.parallel.nvme_path is not None:
        yield from _validate_unwritable("parallel.nvme_path", Path(run.parallel.nvme_path))


def _validate_quantization(run: Run) -> Iterator[ConfigError]:
    """Yield missing packages for quantized weights, also for folders that hold such weights."""
    errors = list(run.model.validate_quantization())
    yield from errors
    if not errors and run.model.quantization == "none" and run.model.quantization_manifest() is not None:
        folder = run.model.local_weights
        if isinstance(run.job, CompressionJob):
            why = "its weights are already quantized"
            fix = "give the original weights"
            if isinstance(run.job, Sparsify):
                fix += ", and quantize what job=sparsify saves"
            yield ConfigError("model.weights", folder, why=why, fix=fix)
        yield from validate_quantized_weights(
            run, "model.weights", folder, instead="give weights that are not quantized"
        )
        manifest = run.model.quantization_manifest()
        if run.lora is not None and manifest is not None:
            yield from validate_adapter_on_quantized(run.lora, manifest.method.kind, option="model.weights")


def _validate_checkpoint(run: Run, run_dir: RunDir, *, world_size: int) -> Iterator[ConfigError]:
    try:
        if (foreign := foreign_to_resume(run.checkpoint.resume)) is not None:
            yield from validate_foreign(foreign, run)
            if run.lora is not None:
                why = f"is a {foreign.title} of all weights, this run trains adapter={run.lora.kind}"
                fix = f"set model.weights={run.checkpoint.resume} checkpoint.resume=none to train it on those weights"
                yield ConfigError("checkpoint.resume", run.checkpoint.resume, why=why, fix=fix)
            return
        saved = find_checkpoint(run.checkpoint.resume, run_dir, say=_warn)
    except ConfigError as error:
        yield error
        return
    if saved is None:
        return
    optimizer = run.optimizer if run.batched_job.trains else None
    yield from validate_resume(saved, model=run.model, optimizer=optimizer, adapter=run.lora, seed=run.job.seed)
    yield from validate_resumed_tokenizer(run, saved)
    if not isinstance(run.job, Train):
        return
    done, steps = saved.manifest.step, run.job.num_steps(run, world_size=world_size)
    is_ending = done == steps and saved.folder.parent == run_dir.checkpoints and not _has_completed(run_dir)
    if steps and done >= steps and not is_ending:
        why = f"{saved.folder} is already at step {done}"
        if run.job.epochs is not None:
            yield run.job.error("epochs", f"{why} of {steps}", "set job.epochs to more")
        else:
            yield ConfigError("job.steps", steps, why=why, fix=f"set job.steps to more than {done}")
    patience, stale = run.job.early_stopping_patience, saved.manifest.stale_evaluations
    if patience is not None and stale >= patience and _has_completed(run_dir):
        why = f"{saved.folder} has stopped early after {stale} evaluations without improvement"
        yield run.job.error("early_stopping_patience", why, f"set it to more than {stale}, or to null")


def _has_completed(run_dir: RunDir) -> bool:
    """Return whether a run ended well.

    One that failed after its last checkpoint has its sample and its loss curve left to write.
    """
    try:
        return read_object(run_dir.result).get("status") == "completed"
    except (OSError, ValueError):
        return False


def resume_details(run: Run, run_dir: Path, *, world_size: int) -> Mapping[str, str]:
    """Return the line of the plan that says what a run continues from, and what is converted."""
    if not run.job.resumes:
        return {}
    try:
        if (foreign := foreign_to_resume(run.checkpoint.resume)) is not None:
            return {"checkpoint": describe_foreign(foreign)}
        saved = find_checkpoint(run.checkpoint.resume, RunDir(run_dir), say=silent)
    except ConfigError:
        return {}  # validate_machine reports it
    if saved is None:
        return {}
    line = describe_resume(saved, parallel=run.parallel, precision=run.precision, world_size=world_size)
    kept = kept_checkpoints(RunDir(saved.folder.parent.parent))
    best = f" (best: {kept.best_text})" if kept and kept.best else ""
    return {"checkpoint": f"{line}{best}"}


def resume_warnings(run: Run, run_dir: Path, *, world_size: int) -> Iterator[str]:
    """Yield differences of a resumed run that the user may not expect."""
    if not run.job.resumes:
        return
    try:
        if foreign_to_resume(run.checkpoint.resume) is not None:
            return
        saved = find_checkpoint(run.checkpoint.resume, RunDir(run_dir), say=silent)
    except ConfigError:
        return  # validate_machine reports it
    if saved is None:
        if run.checkpoint.resume == "auto" and RunDir(run_dir).is_run:
            yield f"{run_dir} holds no checkpoint to continue from: the run starts over"
        return
    steps = run.job.optimizer_steps
    if steps is not None:
        steps = run.job.num_steps(run, world_size=world_size)
        job = run.batched_job
        batch = job.batch(run, world_size=world_size).global_batch
        yield from data_warnings(saved, seed=job.seed, global_batch=batch, sequence_length=job.sequence_length)
    if steps and (line := lr_jump_warning(saved, run.optimizer, run.schedule, steps)):
        yield line
    if run.checkpoint.resume != "auto" and run.model.weights not in ("random", "pretrained"):
        yield f"checkpoint.resume={run.checkpoint.resume} replaces the weights of model.weights={run.model.weights}"


def path_warnings(run: Run, hosts: Sequence[Host]) -> Iterator[str]:
    """Yield local folders that hosts reached by ssh would look for on their own disks."""
    if run.backend.kind != "ssh" or not any(host.ssh_destination for host in hosts):
        return
    if (folder := run.model.local_weights) is not None:
        yield f"model.weights={folder} is a folder of this machine: every host needs it at the same path"
    if run.model.adapter is not None:
        yield f"model.adapter={run.model.adapter} is a folder of this machine: every host needs it at the same path"
    if run.job.resumes and run.checkpoint.resume not in ("none", "auto"):
        folder = Path(run.checkpoint.resume)
        yield f"checkpoint.resume={folder} is a folder of this machine: every host needs it at the same path"


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _validate_missing_tools(run: Run, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """Yield packages and compilers that ranks on this machine need and that are missing.

    On other machines the ranks check themselves.
    """
    if any(host.ssh_destination or not host.is_probed for host in hosts):
        return
    if all(host.devices for host in hosts):
        yield from run.precision.validate_machine()
    else:
        yield from run.compile.validate_machine()


def _validate_unwritable(option: str, folder: Path) -> Iterator[ConfigError]:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        yield ConfigError(option, folder, why=f"{existing} is a file", fix=f"set {option} to a folder")
    elif not os.access(existing, os.W_OK | os.X_OK) or _is_read_only(existing):
        what = "a path in a folder" if option == "job.output" else "a folder"
        yield ConfigError(option, folder, why=f"{existing} is not writable", fix=f"set {option} to {what} of yours")


def validate_nvme_space(run: Run, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """Yield an error if a disk of this machine has no room for the optimizer state.

    It is checked at the start, not in plans, which may be for later.
    """
    if not isinstance(run.parallel, Zero) or run.parallel.offload_optimizer != "nvme" or not run.parallel.nvme_path:
        return
    folder = Path(run.parallel.nvme_path).expanduser()
    state = estimate_memory(run, hosts)
    local = [host for host in hosts if host.is_probed and not host.ssh_destination]
    if state is None or not local:
        return
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    disk = os.statvfs(there)
    free, least = disk.f_bavail * disk.f_frsize, state.per_rank.optimizer * max(host.slots for host in local)
    if free < least:
        why = f"its disk has {bytes_text(free)} free, and optimizer state alone takes {bytes_text(least)}"
        fix = f"set parallel.nvme_path to a disk with {bytes_text(state.per_host_nvme)} free"
        yield ConfigError("parallel.nvme_path", folder, why=why, fix=fix)


def validate_memlock(run: Run, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """Yield an error if this user may not page-lock DeepSpeed's buffers for NVMe.

    DeepSpeed aborts if it cannot lock them, whatever ``parallel.pin_memory`` is. Plans skip this check: they may be for
    another user.
    """
    zero = run.parallel
    if not isinstance(zero, Zero) or zero.offload_parameters != "nvme":
        return
    limit = lockable_bytes()
    needed = zero.nvme_buffer_count * zero.nvme_buffer_size * run.precision.compute_bytes
    if limit is None or needed <= limit or all(host.ssh_destination for host in hosts):
        return
    buffers = f"parallel.nvme_buffer_count={zero.nvme_buffer_count} buffers of nvme_buffer_size={zero.nvme_buffer_size}"
    why = f"its {buffers} are page-locked: {bytes_text(needed)} a rank, and this user may lock {bytes_text(limit)}"
    fix = "raise the limit (`ulimit -l`, limits.conf), or set parallel.offload_parameters=cpu"
    yield ConfigError("parallel.offload_parameters", "nvme", why=why, fix=fix)


def lockable_bytes() -> int | None:
    """Return how much memory a process of this user may page-lock; ``None`` without a limit."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.exists() else []
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if effective >> _CAP_IPC_LOCK & 1 or limit == resource.RLIM_INFINITY else limit


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def validate_run_dir(run: Run, run_dir: RunDir, *, is_locked: bool = False) -> Iterator[ConfigError]:
    """Yield an error for a directory that holds another run, or files of no run.

    Args:
        run: the run that will be written there.
        run_dir: its directory.
        is_locked: whether this process has created and locked it, so that the lock's file is its own.
    """
    if foreign := run_dir.unexpected_files():
        shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        why = f"is not empty, and is not the directory of a run: it holds {shown} and no valid run.yaml"
        yield ConfigError("run.dir", run_dir.path, why=why, fix="choose a new folder, or the directory of a run")
    elif run_dir.is_run and (job := _saved_job(run_dir)) != (ours := _job_words(run.job.kind, run.benchmark.kind)):
        why = f"contains a run of {job}, and this one is of {ours}, and two runs cannot share a directory"
        yield ConfigError("run.dir", run_dir.path, why=why, fix="choose another folder")
    elif run_dir.is_run and (irregular := run_dir.irregular_files()):
        why = f"holds {', '.join(irregular[:3])}, which is a link or not a regular file"
        yield ConfigError("run.dir", run_dir.path, why=why, fix="remove it, or choose another folder")
    elif run.checkpoint.resume != "auto" and run_dir.path.is_dir():
        is_occupied = run_dir.is_run if is_locked else any(run_dir.path.iterdir())
        why, fix = (
            "is not empty, and two runs cannot share a directory",
            "choose another, or set checkpoint.resume=auto",
        )
        if is_occupied:
            yield ConfigError("run.dir", run_dir.path, why=why, fix=f"{fix} to continue it")


def _saved_job(run_dir: RunDir) -> str:
    """Return the job of the run in ``run_dir``, as overrides; "not known" if damaged."""
    try:
        tree = read_snapshot(run_dir.snapshot)
        job, benchmark = tree["job"]["kind"], tree.get("benchmark")
    except (ConfigError, KeyError, TypeError):
        return "an unknown job"
    return _job_words(job, benchmark["kind"] if isinstance(benchmark, dict) and "kind" in benchmark else "none")


def _job_words(job: object, benchmark: object) -> str:
    return f"job={job}" if benchmark == "none" else f"job={job} benchmark={benchmark}"


def _validate_taken_port(backend: Backend) -> Iterator[ConfigError]:
    if backend.port == "auto":
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", backend.port))
    except OSError as error:
        why = f"cannot be used: {error.strerror}"
        yield ConfigError("backend.port", backend.port, why=why, fix="set backend.port=auto")
