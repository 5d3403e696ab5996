"""The padding that a plan names is what the first steps of the run have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from launcher.config.data import padding
from launcher.config.data.auto import AutoData
from launcher.config.data.bpe import train_byte_level_bpe
from launcher.config.data.chat_template import find_template
from launcher.config.data.padding import PADDING_STEPS, PaddingEstimate, estimate_padding
from launcher.config.model.gpt2 import Gpt2
from launcher.data.dataloader import Loader
from launcher.data.dataset import open_splits
from launcher.protocol.plan import Batch

LENGTH = 128


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    chats: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": f"And {n}?"},
                {"role": "assistant", "content": f"It is {n}." * (1 + n % 4)},
            ]
        }
        for n in range(300)
    ]
    pairs = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": "no " * (1 + n % 17)} for n in range(90)]
    for name, rows in {
        "chats": chats,
        "few": [{"prompt": f"{n}", "response": "x" * (n + 1)} for n in range(40)],
        "pairs": pairs,
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes.txt").write_text("A text of some words. " * 90)
    tokenizer = train_byte_level_bpe(["And It is 1234567890? yes no A text of some words."], vocab_size=300)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return tmp_path


def both(
    *, micro_batch: int = 4, equal_shapes: bool = False, steps: int = PADDING_STEPS, **options: Any
) -> tuple[PaddingEstimate, float]:
    """Return what a plan says, and what the first steps of the run have."""
    data = AutoData(tokenizer="tokenizer", packing=False, chat_template="chatml", cache="cache", **options)
    batch = Batch(micro_batch=micro_batch, gradient_accumulation_steps=1, data_parallel=2)
    found = estimate_padding(
        data,
        Tokenizer.from_file("tokenizer/tokenizer.json"),
        template=find_template("chatml", None),
        sequence_length=LENGTH,
        batch=batch,
        num_steps=100,
        seed=3,
        equal_shapes=equal_shapes,
    )
    assert found is not None
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    model = Gpt2(name="tiny", **sizes, max_position_embeddings=LENGTH, vocab_size=400)
    splits = open_splits(data, model, sequence_length=LENGTH, seed=3, equal_shapes=equal_shapes)
    if equal_shapes:
        return found, float(splits.summary.rpartition(": ")[2].partition("%")[0]) / 100
    loader = Loader(splits, batch, seed=3, rank=0)
    return found, sum(map(loader.padding, range(steps))) / steps


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "options",
    [
        {"path": "chats.jsonl"},
        {"path": "chats.jsonl", "micro_batch": 1},
        {"path": ("chats.jsonl", "few.jsonl"), "on_long": "drop"},
        {"path": ("chats.jsonl", "few.jsonl")},
        {"path": ("chats.jsonl", "few.jsonl"), "weights": (1.0, 2.0), "micro_batch": 8},
        {"path": "chats.jsonl", "eval_path": "few.jsonl"},
        {"path": "pairs.jsonl"},
        {"path": ("chats.jsonl", "notes.txt"), "weights": (3.0, 1.0)},
    ],
)
def test_the_estimate_of_few_rows_is_what_the_run_has(options: dict[str, Any]) -> None:
    found, share = both(**options)
    assert found.is_whole
    assert found.share == pytest.approx(share, abs=1e-12)
    assert 0.001 < share < 0.6 or options.get("micro_batch") == 1


@pytest.mark.usefixtures("folder")
def test_rows_of_equal_shapes_are_padded_to_the_sequence() -> None:
    found, share = both(path="chats.jsonl", equal_shapes=True)
    assert found.share == pytest.approx(share, abs=0.0006)  # the run prints thousandths


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_a_sample_comes_close(monkeypatch: pytest.MonkeyPatch, weights: tuple[float, ...]) -> None:
    """A third of the rows: within 3 of 100 tokens."""
    monkeypatch.setattr(padding, "_MOST_ROWS", 80)
    found, share = both(path=("chats.jsonl", "few.jsonl"), weights=weights, steps=256)
    assert not found.is_whole
    assert found.num_rows == 80
    assert found.share == pytest.approx(share, abs=0.03)
