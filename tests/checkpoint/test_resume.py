"""Where a run starts from, and which checkpoints it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from launcher.checkpoint.adapter_base import BaseWeights, is_same_base
from launcher.checkpoint.locks import CheckpointLocks, RemovalLock
from launcher.checkpoint.resume import (
    CheckpointReference,
    data_warnings,
    describe_resume,
    find_checkpoint,
    find_checkpoints,
    lr_jump_warning,
    parse_reference,
    validate_resume,
)
from launcher.config.model.hf import Hf
from launcher.config.model.llama import Llama
from launcher.config.optimizer import AdamW, Optimizer
from launcher.config.parallel.base import Parallel
from launcher.config.parallel.data_parallel import Ddp
from launcher.config.parallel.zero import Zero
from launcher.config.precision import Fp32Precision, Precision
from launcher.config.schedule import ConstantSchedule, CosineSchedule
from launcher.errors import ConfigError
from launcher.protocol.foreign_files import LOOKED_FOR
from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_json, write_json

from .conftest import MODEL, PARALLEL, PRECISION, Save


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
        ("empty", "", f"holds no complete checkpoint, also none of another program (looked for {LOOKED_FOR})"),
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


def test_a_run_without_a_checkpoint_gets_the_command_that_saves_one(tmp_path: Path) -> None:
    RunDir(tmp_path).snapshot.write_text("")
    with pytest.raises(ConfigError, match=r"launch rerun \S+ checkpoint\.at_end=true") as refused:
        find_checkpoint(str(tmp_path), RunDir(tmp_path / "elsewhere"))
    assert refused.value.why.startswith("holds no complete checkpoint")


@pytest.mark.parametrize("resume", ["auto", "", "checkpoints/step_00000020"])
@pytest.mark.parametrize(("version", "fix"), [(2, "let that launcher write"), (4, "update this launcher, or")])
def test_one_of_another_version_is_no_reason_to_take_the_one_before_it(
    tmp_path: Path, save: Save, resume: str, version: int, fix: str
) -> None:
    """The run would repeat its steps, and replace it."""
    save(10)
    file = save(20).folder / "manifest.json"
    write_json(file, {**read_json(file), "version": version})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match=rf"{file} has version {version}, this launcher reads 3") as refused:
        find_checkpoint("auto" if resume == "auto" else str(tmp_path / resume), RunDir(tmp_path))
    assert refused.value.fix.startswith(fix)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    save(30)
    found = find_checkpoint("auto", RunDir(tmp_path))
    assert found is not None
    assert found.manifest.step == 30


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
    assert list(validate_resume(save(10), model=MODEL, optimizer=AdamW())) == []
    renamed = replace(MODEL, name="another", weights="elsewhere")
    assert list(validate_resume(save(10), model=renamed, optimizer=AdamW())) == []


@dataclass(frozen=True, kw_only=True)
class Sgd(Optimizer):
    """Another kind."""

    kind: ClassVar[str] = "sgd"


def test_another_model_or_optimizer_is_refused(save: Save) -> None:
    saved = save(10)
    saved = replace(saved, manifest=replace(saved.manifest, optimizer="adamw"))
    model = replace(MODEL, num_hidden_layers=3, hidden_size=32)
    of_model, of_optimizer = validate_resume(saved, model=model, optimizer=Sgd(lr=1.0))
    assert "its num_hidden_layers is 2, this run's is 3" in of_model.why
    assert (
        of_model.fix == f"set model.hidden_size={MODEL.hidden_size} model.num_hidden_layers={MODEL.num_hidden_layers}"
    )
    assert "has the state of optimizer=adamw, this run has optimizer=sgd" in of_optimizer.why
    assert "set optimizer=adamw, or model.weights=" in of_optimizer.fix
    assert list(validate_resume(saved, model=MODEL)) == [], "a run that does not train has no optimizer"


@pytest.mark.parametrize(
    ("parallel", "precision", "world_size", "changes"),
    [
        (PARALLEL, PRECISION, 2, ""),
        (PARALLEL, PRECISION, 1, ", zero3 on 2 ranks → zero3 on 1 rank"),
        (Ddp(), PRECISION, 2, ", zero3 on 2 ranks → ddp on 2 ranks"),
        (Zero(stage=1), Fp32Precision(), 2, ", zero3 on 2 ranks → zero1 on 2 ranks, bf16 → fp32"),
    ],
)
def test_what_is_converted_is_said(
    tmp_path: Path, save: Save, parallel: Parallel, precision: Precision, world_size: int, changes: str
) -> None:
    said = describe_resume(save(10), parallel=parallel, precision=precision, world_size=world_size)
    assert said == f"step 10 of {tmp_path}{changes}"


def test_a_model_of_another_family_is_named_by_that_alone(save: Save) -> None:
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_size": 16,
    }
    model = Llama(name="tiny", intermediate_size=32, **sizes)
    (error,) = validate_resume(save(10), model=model)
    assert error.why == "is of another model: its family is gpt2, this run's is llama"


def test_other_data_is_said(save: Save) -> None:
    saved = save(10)
    assert list(data_warnings(saved, seed=0, global_batch=16, sequence_length=64)) == []
    batch, seed = data_warnings(saved, seed=1, global_batch=8, sequence_length=64)
    assert "from 16 to 8 sequences after step 10; the data continues after its first 160 sequences" in batch
    assert "job.seed changes from 0 to 1" in seed


def test_a_folder_written_in_another_way_is_the_same_model_and_one_that_is_gone_is_refused_elsewhere(
    tmp_path: Path, save: Save
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text('{"model_type": "mixtral"}')  # of no known sizes
    saved = save(10)
    saved = replace(saved, manifest=replace(saved.manifest, architecture={"family": "hf", "name": "some/made"}))
    assert list(validate_resume(saved, model=Hf(name=str(tmp_path / "made")))) == []
    assert list(validate_resume(saved, model=Hf(name="other")))
    assert list(validate_resume(save(20), model=Hf(name="nowhere"))) == []


def test_one_of_another_version_may_be_passed_over_where_an_older_one_will_do(tmp_path: Path, save: Save) -> None:
    """Serving and exporting need some weights; nothing is repeated or replaced."""
    ten = save(10)
    file = save(20).folder / "manifest.json"
    write_json(file, {**read_json(file), "version": 4})
    said: list[str] = []
    assert list(find_checkpoints(tmp_path, say=said.append, skips_unsupported=True)) == [ten]
    (ten.folder / "model.bin").unlink()
    with pytest.raises(ConfigError, match="has version 4"):
        list(find_checkpoints(tmp_path, say=said.append, skips_unsupported=True))


def test_the_fix_names_the_run_that_can_print_its_model(tmp_path: Path, save: Save) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16}
    saved, other = save(10), Llama(name="tiny", intermediate_size=32, **sizes)  # type: ignore[arg-type]
    (error,) = validate_resume(saved, model=other)
    assert error.fix.endswith(f"as {saved.folder}/model/config.json describes it")
    RunDir(tmp_path).snapshot.write_text("")
    (error,) = validate_resume(saved, model=other)
    assert error.fix.endswith(f"launch show {tmp_path}")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"weights": "random", "seed": 1}, {"weights": "random", "seed": 1}, True),
        ({"weights": "random", "seed": 1}, {"weights": "random", "seed": 2}, False),
        ({"weights": "random", "seed": 1}, {"weights": "pretrained"}, False),
        ({"weights": "a", "fingerprint": "1"}, {"weights": "b", "fingerprint": "1"}, True),
        ({"weights": "a", "fingerprint": "1"}, {"weights": "a", "fingerprint": "2"}, False),
        ({"weights": "a", "fingerprint": "1"}, {"weights": "a"}, True),
    ],
)
def test_weights_are_the_same_by_seed_or_content(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    assert is_same_base(BaseWeights(name="a", **one), BaseWeights(name="b", **other)) is same


def test_a_checkpoint_that_is_not_wanted_after_all_can_be_removed(save: Save) -> None:
    def is_free() -> bool:
        with RemovalLock(ten.folder) as lock:
            return lock.acquire()

    ten = save(10)
    with CheckpointLocks() as locks:
        locks.keep(ten.folder)
        assert not is_free()
        locks.release(ten.folder)
        locks.release(ten.folder)  # one that is not kept
        assert is_free()
