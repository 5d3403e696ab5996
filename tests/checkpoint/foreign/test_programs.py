"""Checkpoints that other programs really wrote: the same weights, and the same losses from there on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from launcher.checkpoint.foreign.source import open_foreign
from launcher.checkpoint.foreign.torch_pickle import BadCheckpoint
from launcher.checkpoint.regions import Box, FlatRange
from launcher.checkpoint.store import CheckpointStore
from launcher.data.dataloader import MicroBatch
from launcher.engines.torch import TorchEngine
from launcher.models.foreign_state import ForeignState, describe_start, state_of_model
from launcher.models.weights import differences, find_tensors
from launcher.protocol.foreign_files import ForeignCheckpoint, find_foreign
from launcher.training.checkpointing import restore_checkpoint
from tests.checkpoint.foreign import programs
from tests.conftest import RunProgram
from tests.engines.worker import QuietClock, make_context
from tests.ports import free_port

EXACT = ("zero1", "zero3", "zero0", "accelerate_fsdp", "titan", "plain", "plain_dcp", "accelerate", "trainer")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, run_forked_program: RunProgram) -> Path:
    """The folder of all programs' checkpoints."""
    folder = tmp_path_factory.mktemp("foreign")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    run_forked_program(Path(programs.__file__), str(folder), kind="deepspeed", DS_ACCELERATOR="cpu", **shared)
    return folder


def meta_model() -> GPT2LMHeadModel:
    with torch.device("meta"):
        model = GPT2LMHeadModel(programs.config())
    model.tie_weights()
    return model


def checkpoint(folder: Path) -> ForeignCheckpoint:
    found = find_foreign(folder)
    assert found is not None
    return found


def state(folder: Path) -> ForeignState:
    return state_of_model(meta_model(), open_foreign(checkpoint(folder)), folder)


def losses_from(taken: ForeignState, make: Callable[[torch.nn.Module], torch.optim.Optimizer]) -> list[float]:
    """Return the losses of a plain model and AdamW that go on from a checkpoint."""
    model = programs.model()
    optimizer = make(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        parameter.data.copy_(taken.tensors.read(name))
        optimizer.state[parameter] = {
            kind: taken.tensors.read(f"{kind}.{name}").clone() for kind in ("step", "exp_avg", "exp_avg_sq")
        }
    return programs.train(model, optimizer, programs.AFTER)


def without_decay(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=programs.LR, weight_decay=0.0)


@pytest.mark.parametrize("name", EXACT)
def test_training_goes_on_as_in_the_program_that_wrote_it(written: Path, name: str) -> None:
    expected = json.loads((written / "losses.json").read_text())[name.removesuffix("_dcp")]
    taken = state(written / name)
    assert describe_start(taken) == "weights and moments"
    found = losses_from(taken, without_decay if name.startswith("plain") else programs.adamw)
    assert found == pytest.approx(expected, rel=1e-6)
    assert open_foreign(checkpoint(written / name)).step in (programs.SAVED_AT, None)
    assert taken.tensors.read("step.transformer.wte.weight").item() == programs.SAVED_AT


def test_a_run_resumes_from_it(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 12, "max_position_embeddings": 16}
    options = {
        "job": {"micro_batch": 4, "sequence_length": 11, "clip_norm": 0.0, "steps": 4},
        "model": {**sizes, "vocab_size": programs.VOCABULARY, "weights": "random", "dropout": 0.0},
        "optimizer": {"lr": programs.LR, "weight_decay": programs.DECAY},
        "checkpoint": {"resume": str(written / "titan")},
    }
    context = make_context({"name": "run", "world": 1, "run": options}, {"gpt2": ""}, tmp_path, 0)
    context.run_dir.path.mkdir()
    context.run_dir.plan.write_text(json.dumps({"run_id": "a-run", "run_hash": "0" * 64}))
    clock: Any = QuietClock()
    with TorchEngine(context, clock) as engine:
        store = CheckpointStore(context.run_dir.checkpoints, context.run.checkpoint)
        restored = restore_checkpoint(store, context, engine)
        losses = []
        for step in programs.AFTER:
            ids = programs.tokens(step)
            batch = MicroBatch(input_ids=ids[:, :-1], labels=ids[:, 1:])
            losses.append(engine.step([batch], lr=programs.LR).loss)
    expected = json.loads((written / "losses.json").read_text())["titan"]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert restored is not None
    assert restored.data is not None
    assert (restored.step, restored.data.sequences) == (programs.SAVED_AT, 4 * programs.SAVED_AT)
    said = "(torch.distributed.checkpoint folder): weights and moments"
    assert f"continuing after step 2 of {written / 'titan'} {said}" in capsys.readouterr().out


def test_masters_of_half_precision_are_those_that_deepspeed_converts(written: Path) -> None:
    converted, taken = torch.load(written / "converted.pt"), state(written / "zero2_bf16")
    for name, _ in meta_model().named_parameters():
        assert torch.equal(taken.tensors.read(name), converted[name]), name
    assert taken.tensors.dtype("transformer.wte.weight") == torch.float32
    assert losses_from(taken, programs.adamw) == pytest.approx(
        json.loads((written / "losses.json").read_text())["zero2_bf16"], rel=1e-3
    )


@pytest.mark.parametrize("name", ["zero3", "titan", "titan_safetensors"])
def test_any_part_is_read_alone(written: Path, name: str) -> None:
    tensors = open_foreign(checkpoint(written / name)).weights
    whole = tensors.read("transformer.h.0.mlp.c_fc.weight")
    assert torch.equal(tensors.read("transformer.h.0.mlp.c_fc.weight", Box((5, 3), (4, 20))), whole[5:9, 3:23])
    some = tensors.read("transformer.h.0.mlp.c_fc.weight", FlatRange(50, 401))
    assert torch.equal(some, whole.flatten()[50:401])


@pytest.mark.parametrize("name", [*EXACT, "zero2_bf16", "titan_safetensors"])
def test_weights_alone_are_found_by_the_model(written: Path, name: str) -> None:
    folder = checkpoint(written / name).weights.folder if name == "trainer" else written / name
    stored = find_tensors(meta_model(), folder, skip=lambda name: False)
    assert differences(stored) == ""
    values = stored.read(["transformer.h.1.mlp.c_proj.weight"])
    assert values is not None
    if name != "titan_safetensors":
        assert torch.equal(values.float(), state(written / name).tensors.read("transformer.h.1.mlp.c_proj.weight"))


def test_without_moments_they_start_at_zero(written: Path) -> None:
    found = open_foreign(checkpoint(written / "titan_safetensors"))
    taken = state_of_model(meta_model(), found, written)
    assert (found.step, found.optimizer_step()) == (None, None)
    assert describe_start(taken) == "weights; the optimizer's moments start at zero"
    assert not taken.tensors.read("exp_avg_sq.transformer.wpe.weight", Box((1, 2), (3, 4))).any()


def test_a_checkpoint_of_another_model_is_refused_by_names_and_shapes(written: Path) -> None:
    config = programs.config()
    config.n_layer, config.n_positions = 3, 17
    with torch.device("meta"):
        other = GPT2LMHeadModel(config)
    with pytest.raises(
        BadCheckpoint, match=r"lacks transformer\.h\.2.*wpe\.weight is \(16, 12\) instead of \(17, 12\)"
    ):
        state_of_model(other, open_foreign(checkpoint(written / "zero1")), written)


def test_moments_whose_order_cannot_be_known_are_refused(written: Path) -> None:
    found = open_foreign(checkpoint(written / "accelerate"))
    found.order = [*(found.order or []), ["99"]]
    with pytest.raises(BadCheckpoint, match=r"numbers 10 \+ 18 \+ 1 parameters, which fits none of the known orders"):
        state_of_model(meta_model(), found, written)


def test_a_file_of_one_rank_that_is_missing_is_named(written: Path, tmp_path: Path) -> None:
    files = checkpoint(written / "zero1")
    assert files.optimizer is not None
    with pytest.raises(BadCheckpoint, match="it is of 2 ranks, and there are files of 1"):
        open_foreign(replace(files, optimizer=replace(files.optimizer, files=files.optimizer.files[:1])))
