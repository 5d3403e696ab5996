"""Where a run starts from, and which checkpoints it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.policy import Checkpoint
from launcher.checkpoint.resume import find, misfits
from launcher.component import Component
from launcher.errors import ConfigError
from launcher.parallel.replicated import Ddp, Single
from launcher.parallel.zero import Zero
from launcher.precision import Fp32
from launcher.rundir import RunDir

from .conftest import MODEL, PARALLEL, PRECISION, Save, manifest_of


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_run_without_checkpoints_starts_from_the_beginning(tmp_path: Path, resume: str) -> None:
    assert find(resume, RunDir(tmp_path)) is None


def test_what_to_resume_is_named_in_four_ways(tmp_path: Path, save: Save) -> None:
    ten, twenty = save(10), save(20)
    here, elsewhere = RunDir(tmp_path), RunDir(tmp_path / "elsewhere")
    assert find("none", here) is None
    assert find("auto", here) == twenty
    assert find("auto", elsewhere) is None
    assert find(str(tmp_path), elsewhere) == twenty
    assert find(str(tmp_path / "checkpoints"), elsewhere) == twenty
    assert find(str(ten.folder), elsewhere) == ten


def test_the_newest_complete_one_is_taken_and_the_others_are_said(tmp_path: Path, save: Save) -> None:
    ten, twenty = save(10), save(20)
    (twenty.folder / "model.bin").unlink()
    said: list[str] = []
    assert find("auto", RunDir(tmp_path), say=said.append) == ten
    assert said == [f"checkpoint {twenty.folder} is skipped: model.bin is missing"]


@pytest.mark.parametrize(
    ("made", "named", "why"),
    [
        ("nothing", "checkpoints", "no such folder"),
        ("file", "checkpoints", "is a file"),
        ("empty", "", "holds no complete checkpoint"),
        ("damaged", "", "holds no complete checkpoint"),
        ("damaged", "checkpoints/step_00000010", "is not complete: model.bin is missing"),
    ],
)
def test_a_folder_without_a_checkpoint_is_refused_before_anything_starts(
    tmp_path: Path, save: Save, made: str, named: str, why: str
) -> None:
    if made == "file":
        (tmp_path / "checkpoints").write_text("")
    elif made == "damaged":
        (save(10).folder / "model.bin").unlink()
    resume = str(tmp_path / named)
    (error,) = Checkpoint(resume=resume).preflight()
    assert (error.option, str(error.value)) == ("checkpoint.resume", resume)
    assert error.why == why
    with pytest.raises(ConfigError, match=r"^checkpoint\.resume="):
        find(resume, RunDir(tmp_path / "elsewhere"))


def test_what_can_be_resumed_passes_the_preflight(tmp_path: Path, save: Save) -> None:
    save(10)
    for resume in ("none", "auto", str(tmp_path)):
        assert list(Checkpoint(resume=resume).preflight()) == []


def test_the_run_that_wrote_it_fits(save: Save) -> None:
    fitting: dict[str, Any] = {"model": MODEL, "parallel": PARALLEL, "precision": PRECISION, "world_size": 2}
    assert list(misfits(save(10), **fitting)) == []
    renamed = replace(MODEL, name="another", weights="elsewhere")
    faster = replace(PARALLEL, overlap_comm=False)
    assert list(misfits(save(10), **{**fitting, "model": renamed, "parallel": faster})) == []


@pytest.mark.parametrize(
    ("change", "why", "fix"),
    [
        ({"model": replace(MODEL, layers=3)}, "its layers is 2, this run's is 3", "run.yaml"),
        ({"world_size": 4}, "partitioned over 2 ranks, this run has 4", "run on 2 ranks"),
        ({"precision": Fp32()}, "precision=bf16, this run has precision=fp32", "set precision=bf16"),
        ({"parallel": Ddp()}, "of kind zero, this run's is ddp", "option of kind zero"),
        ({"parallel": Zero(stage=2)}, "parallel.stage=3, this run has 2", "set parallel.stage=3"),
        ({"parallel": Zero(stage=3, offload_optimizer="cpu")}, "offload_optimizer=none", "offload_optimizer=none"),
    ],
)
def test_a_run_that_differs_is_refused(save: Save, change: dict[str, Component | int], why: str, fix: str) -> None:
    given: dict[str, Any] = {"model": MODEL, "parallel": PARALLEL, "precision": PRECISION, "world_size": 2, **change}
    (error,) = misfits(save(10), **given)
    assert error.option == "checkpoint.resume"
    assert why in error.why
    assert fix in error.fix


def test_everything_that_differs_is_told_at_once(save: Save) -> None:
    model = replace(MODEL, layers=3, width=32)
    errors = list(misfits(save(10), model=model, parallel=Single(), precision=Fp32(), world_size=1))
    assert len(errors) == 4


def test_replicated_weights_load_on_any_number_of_ranks(save: Save) -> None:
    saved = save(10)
    manifest = replace(manifest_of(10), parallel={"kind": "ddp", "bucket_mb": 25}, engine="torch")
    given: dict[str, Any] = {"model": MODEL, "parallel": Ddp(bucket_mb=1), "precision": PRECISION}
    assert list(misfits(replace(saved, manifest=manifest), **given, world_size=8)) == []
