"""Where a run starts from, and which checkpoints it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.resume import (
    CheckpointReference,
    find_checkpoint,
    lr_jump_warning,
    parse_reference,
    validate_resume,
)
from launcher.config.component import Component
from launcher.config.model.hf import Hf
from launcher.config.optimizer import AdamW
from launcher.config.parallel.data_parallel import Ddp, Single
from launcher.config.parallel.zero import Zero
from launcher.config.precision import Fp32Precision
from launcher.config.schedule import ConstantSchedule, CosineSchedule
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir

from .conftest import MODEL, PARALLEL, PRECISION, Save, manifest_of


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_run_without_checkpoints_starts_from_the_beginning(tmp_path: Path, resume: str) -> None:
    assert find_checkpoint(resume, RunDir(tmp_path)) is None


def test_what_to_resume_is_named_in_four_ways(tmp_path: Path, save: Save) -> None:
    ten, twenty = save(10), save(20)
    here, elsewhere = RunDir(tmp_path), RunDir(tmp_path / "elsewhere")
    assert find_checkpoint("none", here) is None
    assert find_checkpoint("auto", here) == twenty
    assert find_checkpoint("auto", elsewhere) is None
    assert find_checkpoint(str(tmp_path), elsewhere) == twenty
    assert find_checkpoint(str(tmp_path / "checkpoints"), elsewhere) == twenty
    assert find_checkpoint(str(ten.folder), elsewhere) == ten


def test_the_newest_complete_one_is_taken_and_the_others_are_said(tmp_path: Path, save: Save) -> None:
    ten, twenty = save(10), save(20)
    (twenty.folder / "model.bin").unlink()
    said: list[str] = []
    assert find_checkpoint("auto", RunDir(tmp_path), say=said.append) == ten
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
    with pytest.raises(ConfigError, match=r"^checkpoint\.resume=") as refused:
        find_checkpoint(str(tmp_path / named), RunDir(tmp_path / "elsewhere"))
    assert refused.value.why == why


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path, save: Save) -> None:
    (save(10).folder / "model.bin").unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint is intact.*model\.bin is missing"):
        find_checkpoint("auto", RunDir(tmp_path))


@pytest.mark.parametrize(
    ("word", "source", "selector", "step"),
    [
        ("runs/x/1", "runs/x/1", None, None),
        ("20260101-120000-abcd@best", "20260101-120000-abcd", "best", None),
        ("x@step_00000010", "x", "step_00000010", 10),
        ("x@step_10", "x", "step_10", 10),
        ("x@worst", "x@worst", None, None),
        ("a@best@step_3", "a@best", "step_3", 3),
        ("@best", "@best", None, None),
    ],
)
def test_a_reference_is_read(word: str, source: str, selector: str | None, step: int | None) -> None:
    assert parse_reference(word) == CheckpointReference(source=source, selector=selector, step=step)


def test_a_folder_whose_name_ends_like_a_reference_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x@best").mkdir()
    assert parse_reference("x@best") == CheckpointReference(source="x@best")


def test_a_learning_rate_that_jumps_is_said(save: Save) -> None:
    optimizer, schedule = AdamW(lr=1e-3), CosineSchedule(warmup_steps=0, final_factor=0.0)
    saved = save(10)
    ended = replace(saved, manifest=replace(saved.manifest, lr=1e-3 * schedule.factor(9, 10)))
    assert lr_jump_warning(ended, optimizer, schedule, 10) is None
    line = lr_jump_warning(ended, optimizer, schedule, 20)
    assert line is not None
    assert "jumps from 2.447e-05 (step 10" in line
    assert "to 0.0005 (step 11)" in line
    constant = ConstantSchedule(warmup_steps=0)
    advised = float(line.rpartition("optimizer.lr=")[2])
    assert lr_jump_warning(ended, AdamW(lr=advised), constant, 20) is None
    assert lr_jump_warning(saved, optimizer, schedule, 20) is None, "no step was taken before it"


def test_the_run_that_wrote_it_fits(save: Save) -> None:
    fitting: dict[str, Any] = {"model": MODEL, "parallel": PARALLEL, "precision": PRECISION, "world_size": 2}
    assert list(validate_resume(save(10), **fitting)) == []
    renamed = replace(MODEL, name="another", weights="elsewhere")
    faster = replace(PARALLEL, overlap_comm=False)
    assert list(validate_resume(save(10), **{**fitting, "model": renamed, "parallel": faster})) == []


@pytest.mark.parametrize(
    ("change", "why", "fix"),
    [
        (
            {"model": replace(MODEL, num_hidden_layers=3)},
            "its num_hidden_layers is 2, this run's is 3",
            "set model.num_hidden_layers=2",
        ),
        ({"world_size": 4}, "partitioned over 2 ranks, this run has 4", "run on 2 ranks"),
        ({"precision": Fp32Precision()}, "precision=bf16, this run has precision=fp32", "set precision=bf16"),
        ({"parallel": Ddp()}, "of kind zero, this run's is ddp", "set parallel=zero3"),
        ({"parallel": Zero(stage=2)}, "parallel.stage=3, this run has 2", "set parallel.stage=3"),
        ({"parallel": Zero(stage=3, offload_optimizer="cpu")}, "offload_optimizer=none", "offload_optimizer=none"),
    ],
)
def test_a_run_that_differs_is_refused(save: Save, change: dict[str, Component | int], why: str, fix: str) -> None:
    given: dict[str, Any] = {"model": MODEL, "parallel": PARALLEL, "precision": PRECISION, "world_size": 2, **change}
    (error,) = validate_resume(save(10), **given)
    assert error.option == "checkpoint.resume"
    assert why in error.why
    assert fix in error.fix


def test_everything_that_differs_is_reported_at_once(save: Save) -> None:
    model = replace(MODEL, num_hidden_layers=3, hidden_size=32)
    errors = list(validate_resume(save(10), model=model, parallel=Single(), precision=Fp32Precision(), world_size=1))
    assert len(errors) == 3
    assert (
        errors[0].fix == f"set model.hidden_size={MODEL.hidden_size} model.num_hidden_layers={MODEL.num_hidden_layers}"
    )


def test_replicated_weights_load_on_any_number_of_ranks(save: Save) -> None:
    saved = save(10)
    manifest = replace(manifest_of(10), parallel={"kind": "ddp", "bucket_mb": 25}, engine="torch")
    given: dict[str, Any] = {"model": MODEL, "parallel": Ddp(bucket_mb=1), "precision": PRECISION}
    assert list(validate_resume(replace(saved, manifest=manifest), **given, world_size=8)) == []


def test_a_folder_written_in_another_way_is_the_same_model_and_one_that_is_gone_is_refused_elsewhere(
    tmp_path: Path, save: Save
) -> None:
    given = {"parallel": PARALLEL, "precision": PRECISION, "world_size": 2}
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text('{"model_type": "mixtral"}')  # of no known sizes
    saved = save(10)
    saved = replace(saved, manifest=replace(saved.manifest, architecture={"family": "hf", "name": "some/made"}))
    assert list(validate_resume(saved, model=Hf(name=str(tmp_path / "made")), **given)) == []
    assert list(validate_resume(saved, model=Hf(name="other"), **given))
    assert list(validate_resume(save(20), model=Hf(name="nowhere"), **given)) == []
