"""Steps of a job in containers, as text, and what containers see: no Slurm needed."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends.slurm.sbatch import render_sbatch
from launcher.backends.slurm.steps import step_command
from launcher.backends.slurm.submit import check_submission
from launcher.config.backend.containers import container_folders, ops_folder_of_image, validate_mounted
from launcher.config.backend.slurm import SlurmBackend
from launcher.config.compose import compose
from launcher.errors import ConfigError, ConfigErrors
from launcher.execution.prepare import prepare


def test_a_step_without_options_is_srun_alone():
    assert step_command(SlurmBackend(), "n1", ("python", "-m", "x"), cwd=Path("/w")) == (
        *("srun", "--quiet", "--nodes=1", "--ntasks=1", "--overlap", "--cpu-bind=none", "--mpi=none"),
        *("--nodelist=n1", "--export=ALL", "python", "-m", "x"),
    )


def test_pyxis_gets_its_options_from_srun_and_setup_stays_outside():
    backend = SlurmBackend(container="pyxis", image="/i.sqsh", setup=("true",), container_mounts=("/s:/t:ro",))
    words = step_command(backend, "n1", ("python", "-m", "x"), folders=(Path("/w"), Path("/d")), cwd=Path("/w"))
    assert words[8:] == (
        "--export=ALL,PYTHONPATH=,PYTHONHOME=,VIRTUAL_ENV=,LD_LIBRARY_PATH=",
        *("--container-image=/i.sqsh", "--container-mounts=/w:/w,/d:/d,/s:/t:ro", "--container-workdir=/w"),
        *("python", "-m", "x"),
    )


@pytest.mark.parametrize("gpus", [None, 4])
def test_apptainer_runs_on_the_node_after_setup(gpus):
    backend = SlurmBackend(container="apptainer", image="/i.sif", setup=("module load x",), gpus_per_node=gpus)
    words = step_command(backend, "n1", ("python3", "-m", "x"), folders=(Path("/w"),), cwd=Path("/w"))
    assert words[8:11] == ("--export=ALL,PYTHONPATH=,PYTHONHOME=,VIRTUAL_ENV=", "bash", "-c")
    assert "\nmodule load x\n" in words[11]
    nv = ("--nv",) if gpus else ()
    inside = ("apptainer", "exec", *nv, "--bind", "/w:/w", "--pwd", "/w", "/i.sif", "python3", "-m", "x")
    assert words[12:] == ("bash", *inside)


def test_ranks_in_a_container_have_its_python_and_the_session_has_its_own(plan_of):
    backend = SlurmBackend(container="apptainer", image="/i.sif")
    plan = plan_of("tracker=local", "backend.ranks=1", hosts=backend.hosts(max_ranks=None))
    assert plan.hosts[0].host.python == "python"
    text = render_sbatch(backend, plan)
    assert f"exec {shlex.quote(sys.executable)} -P -m launcher.backends" in text
    assert "\n# agents and ranks: srun apptainer exec /i.sif python; mounts: working directory, run" in text
    named = SlurmBackend(container="pyxis", image="/i.sqsh", python="/opt/bin/python3").hosts(max_ranks=None)
    assert named[0].python == "/opt/bin/python3"


def test_what_a_container_sees(tmp_path):
    for name in ("work/data", "far", "caches/hub", "home/.cache", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "far" / "text.txt").touch()
    paths = [
        *(("data.path", "data"), ("model.weights", "pretrained"), ("data.files", str(tmp_path / "far" / "text.txt"))),
        *(("job.output", str(tmp_path / "elsewhere" / "not" / "yet")), ("backend.image", "/images/i.sif")),
        *(("run.root", str(tmp_path / "work" / "runs")), ("job.input", "/nothing/of/this")),
    ]
    environ = {"HF_HOME": str(tmp_path / "caches" / "hub"), "HOME": str(tmp_path / "home"), "TORCH_HOME": "/nowhere"}
    found = container_folders(paths, cwd=tmp_path / "work", environ=environ)
    inside = ("work", "elsewhere", "far/text.txt", "caches/hub", "home/.cache")
    assert set(found) == {tmp_path / name for name in inside}


def test_operators_of_an_image_have_a_folder_of_their_own():
    environ = {"HOME": "/home/me"}
    first, other = (ops_folder_of_image(image, environ) for image in ("/a.sif", "/b.sif"))
    assert first.parent == Path("/home/me/.cache/launcher/ops")
    assert first != other
    assert ops_folder_of_image("/a.sif", {"XDG_CACHE_HOME": "/c"}).is_relative_to("/c")


def test_a_path_that_no_mount_can_name_is_refused_by_its_option():
    named = [("data.path", "/a,b"), ("run.dir", "/runs/x"), ("job.input", "/c:d"), ("backend.image", "/i:1.sqsh")]
    assert [error.option for error in validate_mounted([*named, ("model.name", "org/a:b")])] == [
        "data.path",
        "job.input",
    ]


def test_a_run_in_a_container_checks_its_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("backend=slurm", "backend.container=pyxis", "backend.image=/i.sqsh", f"run.dir='{tmp_path}/a:b'")
    with pytest.raises(ConfigErrors, match=r"run\.dir=.*a:b: holds a comma or a colon"):
        prepare(compose([*words, "tracker=local"]))


def test_an_image_that_does_not_exist_is_refused(plan_of, tmp_path):
    backend = SlurmBackend(container="apptainer", image=f"{tmp_path}/none.sif")
    plan = plan_of("tracker=local", "backend.ranks=1", hosts=backend.hosts(max_ranks=None))
    with pytest.raises(ConfigError, match=r"backend\.image=.*none\.sif: there is no such file"):
        check_submission(backend, replace(plan, run_dir=str(tmp_path)))
