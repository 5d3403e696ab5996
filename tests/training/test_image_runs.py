"""Runs of image-text models: every strategy takes the steps of one process, and a run continues to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import image_model
import pytest
import torch
from transformers import AutoModelForImageTextToText

from launcher.models.processor import load_processor
from launcher.utils.files import read_json, write_json
from tests.helpers import losses
from tests.image_rows import picture, write_image_rows

WORDS = (
    *("model=hf", "model.name=./model", "model.weights=random", "data=auto", "data.path=data/rows.jsonl"),
    *("tracker=local", "backend.threads=1", "schedule=constant", "job.sequence_length=256", "backend.ranks=2"),
)


@pytest.fixture
def made(tmp_path: Path) -> Any:
    def make(kind: str, **options: Any) -> None:
        image_model.write_image_model(tmp_path / "model", kind)
        file = tmp_path / "model" / "config.json"
        config = read_json(file)
        for part in ("text_config", "vision_config"):  # so large that images matter to answers
            config[part]["initializer_range"] = 0.1
        write_json(file, config)
        write_image_rows(tmp_path / "data", 16, **options)

    return make


@pytest.mark.parametrize(
    ("kind", "strategies"),
    [
        ("idefics3", ["ddp_micro1", "zero2", "zero3_micro1", "fsdp_micro1"]),
        ("llava", ["ddp", "fsdp"]),
        ("qwen2_vl", ["ddp_micro1", "zero3_micro1"]),
    ],
)
def test_strategies_take_the_steps_of_one_process(launch, tmp_path, made, kind, strategies) -> None:
    """With micro-batches of one row, ranks have rows without images while others have some."""
    made(kind)
    words = (*WORDS, "job=verify", "job.steps=2", "job.micro_batch=2", "job.global_batch=4", "run.dir=run")
    launch(*words, f"job.strategies=[{','.join(strategies)}]", timeout=300).expect(0)
    rows = read_json(tmp_path / "run" / "verify.json")["strategies"]
    assert list(rows) == strategies
    assert all(row["passed"] and row["loss_diff"] <= 1e-5 for row in rows.values())


def test_a_run_continues_to_the_bit_and_transformers_loads_it(launch, tmp_path, made) -> None:
    made("idefics3")
    words = (*WORDS, "parallel=ddp", "job.micro_batch=2", "job.steps=4", "job.eval_every=2", "job.sample_tokens=0")
    words = (*words, "checkpoint.every=2", "checkpoint.keep=0", "job.eval_sequences=2")
    launch(*words, "run.dir=whole").expect(0)
    launch(*words, "run.dir=again", "checkpoint.resume=whole/checkpoints/step_00000002").expect(0)
    assert losses(tmp_path / "again") == losses(tmp_path / "whole", after=2)
    said = launch("export", "whole", "exported").expect(0).stdout
    assert (
        "use it: AutoModelForImageTextToText and AutoProcessor.from_pretrained('exported'), or launch job=serve" in said
    )
    module = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported").eval()
    processor = load_processor(tmp_path / "exported", option="model.name")
    inputs = processor.inputs("<|im_start|>User:<image>What?<end_of_utterance>\nAssistant:", [picture(1)])
    arrays = {name: torch.from_numpy(value) for name, value in inputs.arrays.items()}
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([inputs.input_ids]), **arrays).logits
    assert torch.isfinite(logits).all()


def test_a_text_model_and_what_splits_a_model_are_refused(launch, tmp_path, made) -> None:
    made("llava")
    for words, expected in (
        (("parallel=pipeline", "parallel.stages=2"), "image encoder is no stage of a pipeline"),
        (("parallel=fsdp", "parallel.tensor=2"), "parallel.tensor=2"),
        (("parallel=fsdp", "parallel.sequence_parallel=2"), "parallel.sequence_parallel=2"),
        (("data.packing=true",), "data.packing=true"),
        (("data.max_image_pixels=100",), "an image may have 100"),
    ):
        ended = launch(*WORDS, *words, "run.dir=refused").expect(2)
        assert expected in ended.output
    text = ("data=auto", "data.path=data/rows.jsonl", "data.chat_template=chatml", "tracker=local", "run.dir=refused")
    ended = launch("model=gpt2_tiny", *text).expect(2)
    assert "holds images, and the model takes text alone" in ended.output
