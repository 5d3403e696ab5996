"""Job steps: the srun command that starts a module on one node, in a container or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.backends.slurm.setup import setup_on_node
from launcher.config.backend.slurm import SlurmBackend

_STEP = ("--nodes=1", "--ntasks=1", "--overlap", "--cpu-bind=none", "--mpi=none")
_HOST_ONLY = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables of the Python on the nodes; a container has another one."""


def step_command(
    backend: SlurmBackend, node: str, module: Sequence[str], *, folders: Sequence[Path] = (), cwd: Path
) -> tuple[str, ...]:
    """Return the srun command that runs ``module`` on a node of this job.

    It is a separate job step that shares the resources of the job. Not ``--unbuffered``, which inserts a terminal that
    changes bytes. No binding: the ranks together use every core of the node. The steps inherit the variables of the
    batch script.

    Args:
        backend: options of setup and containers.
        node: its name.
        module: the interpreter and its arguments.
        folders: what a container must see, at the same path.
        cwd: the working directory.
    """
    step = ("srun", "--quiet", *_STEP, f"--nodelist={node}")
    mounts = ",".join((*(f"{folder}:{folder}" for folder in folders), *backend.container_mounts))
    if backend.container == "pyxis":  # its image's own variables win over those of the node, PATH among them
        unset = ",".join(f"{name}=" for name in (*_HOST_ONLY, "LD_LIBRARY_PATH"))
        inside = (f"--container-image={backend.image}", f"--container-mounts={mounts}", f"--container-workdir={cwd}")
        return (*step, f"--export=ALL,{unset}", *inside, *module)
    if backend.container == "apptainer":  # it sets PATH and LD_LIBRARY_PATH of its own
        unset = ",".join(f"{name}=" for name in _HOST_ONLY)
        gpus = ("--nv",) if backend.gpus_per_node else ()
        inside = ("apptainer", "exec", *gpus, "--bind", mounts, "--pwd", str(cwd), str(backend.image))
        return (*step, f"--export=ALL,{unset}", *setup_on_node(backend.setup), *inside, *module)
    return (*step, "--export=ALL", *setup_on_node(backend.setup), *module)


def describe_steps(backend: SlurmBackend) -> str:
    """Return which container the steps of a job run in; empty without one."""
    if backend.container == "none":
        return ""
    python = backend.python or "python"
    command = f"srun --container-image={backend.image} {python}"
    if backend.container == "apptainer":
        command = f"srun apptainer exec {backend.image} {python}"
    mounts = "working directory, run directory, paths of options, plugins, caches"
    return f"agents and ranks: {command}; mounts: {', '.join((mounts, *backend.container_mounts))}"
