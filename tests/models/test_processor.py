"""The processor of image-text models, and batches of what it makes: the inputs and logits that Transformers has."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import image_model
import numpy as np
import pytest
import torch
from transformers import AutoProcessor, PreTrainedModel

from launcher.config.activation import NoCheckpointing
from launcher.config.attention import SdpaAttention
from launcher.config.data.auto import AutoData
from launcher.config.model.hf import Hf
from launcher.data.dataloader import Loader
from launcher.data.dataset import open_splits
from launcher.data.example_worker import EncodingTask, encode_blocks, main, read_frame
from launcher.data.rows import IGNORE_INDEX
from launcher.engines.loss import token_loss_sum
from launcher.errors import ConfigError
from launcher.models.build import build_model
from launcher.models.processor import join_arrays, load_processor
from launcher.protocol.plan import Batch
from tests.image_rows import picture, write_image_rows, write_rows

CPU = torch.device("cpu")


@pytest.fixture(params=image_model.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    image_model.write_image_model(tmp_path / request.param, request.param)
    return tmp_path / request.param


def built(folder: Path) -> PreTrainedModel:
    """Return a model whose weights are so large that attention differs from place to place."""
    model = Hf(name=str(folder), weights="random")
    module = build_model(model, seed=1, attention=SdpaAttention(), activation=NoCheckpointing()).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return module


def test_a_batch_has_the_loss_of_its_rows_one_by_one(folder: Path, tmp_path: Path) -> None:
    """Rows as the processor alone makes them, without padding or other rows: the same sums within 1e-5 of fp32."""
    data = AutoData(path=str(write_image_rows(tmp_path / "data")), tokenizer="model", cache=str(tmp_path / "cache"))
    model = Hf(name=str(folder), weights="random")
    splits = open_splits(data, model, sequence_length=512, seed=0, packs=False)
    module, processor = built(folder), load_processor(folder, option="model.name")
    template = data.template(folder)
    assert template is not None
    alone = sum(_loss_alone(module, processor, example) for example in data.sources()[0].examples(template))
    assert splits.train.num_sequences + splits.held_out.num_sequences == 12
    for size in (1, 4):
        loader = Loader(splits, Batch(micro_batch=size, gradient_accumulation_steps=1, data_parallel=1), seed=0, rank=0)
        parts = [*loader.in_order(splits.train, 12), *loader.in_order(splits.held_out, 12)]
        with torch.no_grad():
            together = sum(token_loss_sum(module, one, device=CPU) for part in parts for one in part)
        assert float(together) == pytest.approx(float(alone), rel=1e-5)
        assert all(one.arrays for part in parts for one in part), "a rank would wait for one without images"
        if size == 1:
            assert sum(len(one.input_ids) == 2 for part in parts for one in part) == 4, "rows without images"


def _loss_alone(module: PreTrainedModel, processor: Any, example: Any) -> torch.Tensor:
    """Return the summed loss of an example's answer, from what the processor returns for it."""
    made = processor.inputs(example.text, [image.open() for image in example.images])
    arrays = {name: torch.from_numpy(value) for name, value in made.arrays.items()} if example.images else {}
    ids = torch.tensor([made.input_ids])
    with torch.no_grad():
        logits = module(input_ids=ids, use_cache=False, **arrays).logits[0, :-1].float()
    answer = "".join(segment.text for segment in example.segments if segment.is_trained)
    num_trained = len(processor.tokenizer.encode(answer, add_special_tokens=False).ids)
    after = example.segments[-1].text if not example.segments[-1].is_trained else ""
    num_after = len(processor.tokenizer.encode(after, add_special_tokens=False).ids)
    labels = ids[0, 1:].clone()
    labels[: len(labels) - num_after - num_trained] = IGNORE_INDEX
    if num_after:
        labels[-num_after:] = IGNORE_INDEX
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)


@pytest.mark.parametrize("kind", ["idefics3", "llava"])
def test_inputs_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """The whole processor of Qwen2-VL cannot be loaded here: its part for videos needs torchvision."""
    image_model.write_image_model(tmp_path, kind)
    whole = AutoProcessor.from_pretrained(tmp_path)
    parts = [{"type": "image", "image": picture(1)}, {"type": "image", "image": picture(2, (40, 20))}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}]
    made = whole.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="np")
    text = whole.apply_chat_template(messages)
    ours = load_processor(tmp_path, option="model.name").inputs(text, [picture(1), picture(2, (40, 20))])
    assert ours.input_ids == made["input_ids"][0].tolist()
    for name, value in ours.arrays.items():
        assert np.array_equal(value, made[name]), name
    assert "pixel_values" in ours.arrays


def test_the_number_of_images_must_be_that_of_the_text(tmp_path: Path) -> None:
    image_model.write_image_model(tmp_path, "llava")
    processor = load_processor(tmp_path, option="model.name")
    with pytest.raises(ValueError, match="2 × <image>, and there are 1 images"):
        processor.inputs("<image> <image>", [picture(1)])


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    image_model.write_image_model(tmp_path, "llava")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.name.*cannot load the processor"):
        load_processor(tmp_path, option="model.name")


def test_arrays_of_other_sizes_are_filled_up_with_zeros() -> None:
    one, other = np.ones((1, 2, 3)), np.full((2, 1, 4), 2.0)
    joined = join_arrays([one, other])
    assert joined.shape == (3, 2, 4)
    assert joined.sum() == one.sum() + other.sum()
    assert joined[0, :2, :3].tolist() == one[0].tolist()


def task_of(data: AutoData, folder: Path, *, worker: int = 0, num_workers: int = 1) -> EncodingTask:
    return EncodingTask(
        sources=data.sources(),
        template=data.template(folder),
        tokenizer="",
        end_id=None,
        worker=worker,
        num_workers=num_workers,
        processor=folder,
    )


def test_worker_processes_send_the_blocks_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_model.write_image_model(tmp_path, "idefics3")
    data = AutoData(path=str(write_image_rows(tmp_path / "data", 20)), tokenizer="model")
    sent = []
    for worker in range(2):
        task = task_of(data, tmp_path, worker=worker, num_workers=2)
        stdin, stdout = io.BytesIO(pickle.dumps(task)), io.BytesIO()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdin", SimpleNamespace(buffer=stdin))
            patched.setattr(sys, "stdout", SimpleNamespace(buffer=stdout))
            main()
        stdout.seek(0)
        while (block := read_frame(stdout)) is not None:
            sent.append(block)
    alone = list(encode_blocks(task_of(data, tmp_path)))
    assert len(sent) == len(alone) == 3
    for one, other in zip(sorted(sent, key=lambda block: block.key), alone, strict=True):
        assert one.key == other.key
        assert one.arrays == other.arrays
        assert one.stamps == other.stamps
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.is_trained, other.is_trained)
    assert sum(map(len, alone[0].arrays)) > 0


def test_a_damaged_image_is_named_with_its_row_or_left_out(tmp_path: Path) -> None:
    image_model.write_image_model(tmp_path, "llava")
    file = write_image_rows(tmp_path / "data", 4)
    damaged = tmp_path / "data" / "pictures" / "2-1.png"
    damaged.write_bytes(damaged.read_bytes()[:90])
    with pytest.raises(ConfigError, match=r"line 3 of .*2-1\.png\) is damaged or cut off"):
        list(encode_blocks(task_of(AutoData(path=str(file)), tmp_path)))
    (block,) = encode_blocks(task_of(AutoData(path=str(file), on_bad_row="skip"), tmp_path))
    assert len(block.lengths) == len(block.arrays) == 3


def test_pixels_in_the_cache_are_those_of_the_files(tmp_path: Path) -> None:
    """A cache by the rows alone would keep those of an image that was replaced, or of other folders with equal rows."""
    image_model.write_image_model(tmp_path / "model", "llava")
    row = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}
    model = Hf(name=str(tmp_path / "model"), weights="random")

    def pixels(name: str, number: int | None = None) -> np.ndarray:
        file = write_rows(tmp_path / name, [{**row, "images": ["a.png"]}] * 4)
        if number is not None:
            picture(number).save(tmp_path / name / "a.png")
        data = AutoData(path=str(file), tokenizer="model", cache=str(tmp_path / "cache"))
        row_read = open_splits(data, model, sequence_length=64, seed=0, packs=False).train.row(0)
        return np.array(row_read.arrays["pixel_values"])

    first = pixels("one", 1)
    assert np.array_equal(pixels("one"), first)
    assert not np.array_equal(pixels("other", 2), first)
    assert not np.array_equal(pixels("one", 2), first)
    assert np.array_equal(pixels("one"), pixels("other"))
