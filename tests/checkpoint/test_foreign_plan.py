"""What the plan says of a run that takes weights or all of its state from another program's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.checkpoint.foreign.plan import (
    describe_foreign,
    foreign_to_resume,
    foreign_weights_details,
    validate_foreign,
)
from launcher.config.compose import compose
from launcher.config.model.folder import weight_bytes
from launcher.errors import ConfigError
from launcher.execution.run_references import resolve_run_references

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": 300}
SIZES = ("model.num_hidden_layers=2", "model.hidden_size=32", "model.max_position_embeddings=64")


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    """A folder of Trainer's, as far as its names go."""
    folder = tmp_path / "out" / "checkpoint-8"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / name).touch()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 8}))
    (folder / "config.json").write_text(json.dumps(GPT2))
    return folder


def refusals(folder: Path, *words: str) -> list[ConfigError]:
    run = compose(("model=gpt2_tiny", *SIZES, "model.vocab_size=300", f"checkpoint.resume={folder}", *words)).run
    foreign = foreign_to_resume(run.checkpoint.resume)
    assert foreign is not None
    return list(validate_foreign(foreign, run))


def test_the_plan_says_what_it_is_and_what_it_lacks(trainer: Path) -> None:
    assert refusals(trainer.parent, "job.steps=9") == []
    found = foreign_to_resume(str(trainer.parent))
    assert found is not None
    line = describe_foreign(found)
    assert line.startswith("step 8 of ")
    assert "checkpoint-8 (Trainer checkpoint): weights and moments are converted; not in it: order of the data" in line
    (trainer / "optimizer.pt").unlink()
    found = foreign_to_resume(str(trainer))
    assert found is not None
    assert ": weights (moments start at zero) are converted; not in it" in describe_foreign(found)


def test_a_run_that_has_no_step_left_or_another_optimizer_or_model_is_refused(trainer: Path) -> None:
    (error,) = refusals(trainer, "job.steps=8")
    assert str(error) == f"job.steps=8: {trainer} is already at step 8; set job.steps to more than 8"
    (error,) = refusals(trainer, "job.steps=9", "model.num_hidden_layers=3")
    assert error.why == "is of another model: its num_hidden_layers is 2, this run's is 3"
    (error,) = refusals(trainer, "job.steps=9", "optimizer=sgd")
    assert error.why == "takes over moments of AdamW, and this run has optimizer=sgd"
    assert error.fix.startswith("set optimizer=adamw, or set model.weights=")
    (trainer / "config.json").write_text(json.dumps({"model_type": "mixtral"}))  # of no known sizes: ranks compare
    assert refusals(trainer, "job.steps=9") == []


def test_weights_without_a_step_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (error,) = refusals(tmp_path)
    assert error.why.startswith("is a folder of weights without an optimizer, and nothing in it says how many steps")
    assert error.fix == f"set model.weights={tmp_path} checkpoint.resume=none to start over from its weights"
    assert refusals(tmp_path, "job=evaluate") == []


def test_one_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(ConfigError, match=r"cut by tensor parallelism .* give that folder to model\.weights"):
        foreign_to_resume(str(tmp_path))


@pytest.mark.parametrize("resume", ["none", "auto", "/nowhere"])
def test_other_values_are_no_folder_of_another_program(resume: str) -> None:
    assert foreign_to_resume(resume) is None


def test_its_tokenizer_is_that_of_the_data(trainer: Path) -> None:
    words = ("model=gpt2_tiny", *SIZES, f"checkpoint.resume={trainer}", "data=text", "data.path=/nowhere")
    assert resolve_run_references(compose(words)).data.tokenizer != str(trainer)  # type: ignore[attr-defined]
    (trainer / "tokenizer.json").write_text("{}")
    run = resolve_run_references(compose(words))
    assert run.data.tokenizer == str(trainer)  # type: ignore[attr-defined]


def test_weights_of_another_program_are_named(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    run = compose(("model=gpt2_tiny", f"model.weights={tmp_path}")).run
    details = foreign_weights_details(run)
    assert details["weights"].endswith(" (torch.distributed.checkpoint folder), converted as they are read")
    assert not list(run.model.validate_machine())
    (tmp_path / "__0_0.distcp").write_bytes(bytes(7))
    assert weight_bytes(tmp_path) == 7
    (tmp_path / "model.safetensors").touch()
    assert not foreign_weights_details(run)
