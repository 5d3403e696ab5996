"""Queueing a run: sbatch, and what it refuses in words of ours."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends.slurm.client import Partition, ask, partitions, words_of
from launcher.backends.slurm.script import script
from launcher.errors import ConfigError, ConfigErrors, EnvironmentProblem
from launcher.rundir import RunDir, StagedFiles
from launcher.supervise.conclude import files_of_end
from launcher.supervise.whereabouts import Whereabouts, place_of_this_process, read_whereabouts, write_whereabouts

if TYPE_CHECKING:
    from launcher.backends.slurm.backend import Slurm
    from launcher.plan import Plan

_HABITS = ("ACCOUNT", "PARTITION", "QOS", "RESERVATION", "CONSTRAINT")
"""SBATCH_… variables that stand for options of ours which are not set. All others would change the script unseen."""

_OPTION_BY_WORDS = {
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "time limit": "time",
    "generic resource": "gpus_per_node",
    "gres": "gpus_per_node",
    "reservation": "reservation",
    "feature": "constraint",
    "memory": "mem",
    "cpu count": "cpus_per_task",
    "processors": "cpus_per_task",
    "node name": "nodelist",
    "node count": "nodes",
    "node configuration": "nodes",
    "nodes": "nodes",
}
"""What Slurm's own words are about; the first that occurs counts."""


def queue(backend: Slurm, plan: Plan) -> str:
    """Write the batch script into the run directory, submit it, and return the number of the job.

    Raises:
        ConfigError: Slurm refuses it; the run directory is as it was.
        EnvironmentProblem: there is no Slurm here, or it does not answer.
    """
    run_dir, staged = RunDir(Path(plan.run_dir)), StagedFiles()
    file = run_dir.path / "job.sbatch"
    try:
        staged.write(file, script(backend, plan))
        for ended in files_of_end(run_dir):  # before the job may write its own
            staged.remove(ended)
        job_id = _sbatch(backend, file)
    except (ConfigError, EnvironmentProblem):
        staged.undo()
        raise
    print(f"job {job_id} is queued; its output goes to {run_dir.logs / f'slurm.{job_id}.log'}", flush=True)
    _record(run_dir, job_id)
    if not backend.wait:
        for verb in ("status", "logs -f", "cancel"):
            print(f"  launch {verb} {run_dir.path}")
    return job_id


def validate(backend: Slurm, plan: Plan) -> None:
    """Refuse a run that is queued already, and what no partition can give.

    Raises:
        ConfigErrors: Slurm would not take it, or would keep it waiting for ever.
        EnvironmentProblem: there is no Slurm here, or it does not answer.
    """
    _refuse_queued(RunDir(Path(plan.run_dir)))
    if mistakes := list(refusals(backend, partitions())):
        raise ConfigErrors(mistakes)


def _record(run_dir: RunDir, job_id: str) -> None:
    """Write the job's number to session.json, unless the job has begun and did so itself.

    A full disk does not change that it is queued.
    """
    written = read_whereabouts(run_dir)
    if written is not None and written.job.get("id") == job_id:
        return
    try:
        write_whereabouts(run_dir, Whereabouts(backend="slurm", session=place_of_this_process(), job={"id": job_id}))
    except OSError as error:
        print(f"{run_dir.session} cannot be written ({error.strerror}): end the job with scancel {job_id}", flush=True)


def refusals(backend: Slurm, known: Sequence[Partition]) -> Iterator[ConfigError]:
    """Yield what no partition can give: left to itself, Slurm may keep such a job waiting without a word."""
    wanted = backend.partition or os.environ.get("SBATCH_PARTITION")
    named = wanted.split(",") if wanted else [queue.name for queue in known if queue.is_default]
    chosen = [queue for queue in known if queue.name in named]
    for name in named:
        if name not in [queue.name for queue in known]:
            yield backend.refuse("partition", f"there is no partition {name}", _choose(known))
    if not named:
        yield ConfigError("backend.partition", why="Slurm has no default here", fix=_choose(known))
    if not chosen:
        return
    time_s, longest = backend.time_s(), max(chosen, key=lambda queue: queue.limit_s)
    if time_s is not None and time_s > longest.limit_s:
        yield backend.refuse("time", f"partition {longest.name} allows {longest.limit}", _choose(known))
    largest = max(chosen, key=lambda queue: queue.num_nodes)
    if backend.nodes > largest.num_nodes:
        yield backend.refuse("nodes", f"partition {largest.name} has {largest.num_nodes}", _choose(known))


def submission_env(backend: Slurm, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for sbatch: nothing in it may change what the script says.

    SBATCH_… variables win over a script, and SLURM_… of a job that we may be in go along into the new one.
    """
    unset = {f"SBATCH_{name}" for name in _HABITS if getattr(backend, name.lower()) is None}
    kept = {"SLURM_CONF", *unset}
    return {
        name: value for name, value in environ.items() if name in kept or not name.startswith(("SBATCH_", "SLURM_"))
    }


def _sbatch(backend: Slurm, file: Path) -> str:
    answer = ask(["sbatch", "--parsable", str(file)], env=submission_env(backend, os.environ))
    if answer.returncode:
        raise refusal(backend, words_of(answer.stderr))
    return answer.stdout.strip().partition(";")[0]


def refusal(backend: Slurm, words: str) -> ConfigError:
    """Return what sbatch said as a mistake in one option, where its words tell which."""
    lower = words.lower()
    for about, option in _OPTION_BY_WORDS.items():
        if about in lower:
            fix = (
                _choose(partitions()) if option in ("partition", "time", "nodes") else "`scontrol show node` tells more"
            )
            return ConfigError(f"backend.{option}", getattr(backend, option), why=f"Slurm says: {words}", fix=fix)
    return ConfigError("backend", "slurm", why=f"Slurm says: {words}", fix="`sinfo` shows what it can give")


def _refuse_queued(run_dir: RunDir) -> None:
    """Refuse to queue a run twice: both jobs would write into its directory."""
    before = read_whereabouts(run_dir)
    if before is None or before.backend != "slurm" or "id" not in before.job:
        return
    job_id = before.job["id"]
    if ask(["squeue", "--noheader", f"--jobs={job_id}", "--format=%T"]).stdout.strip():
        fix = f"wait for it, or type: launch cancel {run_dir.path}"
        raise ConfigError("run.dir", run_dir.path, why=f"job {job_id} of this run is still queued or running", fix=fix)


def _choose(known: Sequence[Partition]) -> str:
    return f"the partitions are {', '.join(map(str, known))}"
