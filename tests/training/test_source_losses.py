"""The loss of each source of a mixture: what a forward pass of its rows alone says, under every strategy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config.compose import compose
from launcher.data.dataloader import Loader, MicroBatch
from launcher.data.dataset import Splits, open_run_splits
from launcher.data.rows import IGNORE_INDEX
from launcher.models.build import build_model
from launcher.protocol.plan import Batch
from tests.conftest import Launch
from tests.helpers import losses

SOURCES = ("chats.jsonl", "pairs.jsonl")
WORDS = (
    *("data=auto", "data.path=[chats.jsonl,more/pairs.jsonl]", "data.weights=[3,1]", "data.chat_template=chatml"),
    *("data.vocab_size=300", "data.held_out=0.2", "data.cache=cache", "model.vocab_size=300", "model.dropout=0"),
    *("model.num_hidden_layers=4", "model.hidden_size=32", "model.num_attention_heads=2"),
    *("model.max_position_embeddings=64", "job.sequence_length=64", "job.global_batch=8", "backend.threads=1"),
)
TRAIN = (
    *("job.eval_sequences=6", "job.sample_tokens=0", "job.steps=2", "tracker=local"),
    "optimizer.lr=1e-30",  # so that every loss is of the weights that the run begins with
)
STRATEGIES = {
    "single": ("parallel=single", "backend.ranks=1", "job.micro_batch=2"),
    "ddp": ("parallel=ddp", "backend.ranks=2", "job.micro_batch=2"),
    "sequence": ("parallel=fsdp", "parallel.sequence_parallel=2", "backend.ranks=2", "job.micro_batch=4"),
    "1f1b": ("parallel=pipeline", "backend.ranks=2", "job.micro_batch=2"),
    "zbv": ("parallel=pipeline", "parallel.schedule=zbv", "backend.ranks=2", "job.micro_batch=2"),
    "deepspeed": ("parallel=deepspeed_pipeline", "backend.ranks=2", "job.micro_batch=2"),
    "unpacked": ("parallel=ddp", "backend.ranks=2", "job.micro_batch=2", "data.packing=false"),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Chats and prompts, whose answers alone count."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"And {n}?"},
                {"role": "assistant", "content": f"It is {n + 1}." * (1 + n % 2)},
            ]
        }
        for n in range(60)
    ]
    pairs = [{"prompt": f"Twice {n}?", "response": f"{2 * n}"} for n in range(30)]
    (tmp_path / "more").mkdir()
    for file, rows in {"chats.jsonl": chats, "more/pairs.jsonl": pairs}.items():
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def documents(batch: MicroBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tokens and labels of each example of a batch."""
    for row in range(len(batch.input_ids)):
        length = batch.input_ids.shape[1]
        where = torch.arange(length) if batch.position_ids is None else batch.position_ids[row]
        bounds = [*(where == 0).nonzero().flatten().tolist(), length]
        for first, last in pairwise(bounds):
            yield batch.input_ids[row, first:last], batch.labels[row, first:last]


def by_hand(splits: Splits, model: Any, batches: list[MicroBatch]) -> dict[str, float]:
    """Return the losses that single examples have, each by itself; their text tells where they come from."""
    sums = {name: [0.0, 0] for name in SOURCES}
    for ids, labels in (one for batch in batches for one in documents(batch)):
        if not (labels != IGNORE_INDEX).any():
            continue
        assert splits.tokenizer is not None
        source = SOURCES["Twice" in splits.tokenizer.decode(ids.tolist())]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        sums[source][0] += float(loss)
        sums[source][1] += int((labels != IGNORE_INDEX).sum())
    found = {name: total / count for name, (total, count) in sums.items() if count}
    return {**found, "": sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())}


def expected(words: tuple[str, ...]) -> dict[str, dict[int, float]]:
    """Return every loss that a run of two steps records, by its name and step."""
    run = compose([*WORDS, *TRAIN, *words]).run
    splits = open_run_splits(run)
    model = build_model(run.model, seed=run.job.seed, attention=run.attention, activation=run.activation).eval()
    batch = Batch(micro_batch=8, gradient_accumulation_steps=1, data_parallel=1)
    loader = Loader(splits, batch, seed=run.job.seed, rank=0)
    found: dict[str, dict[int, float]] = {}
    for step in (0, 1):
        for name, loss in by_hand(splits, model, loader.step(step)).items():
            found.setdefault(f"train/{name}/loss".replace("//", "/"), {})[step + 1] = loss
    evaluated = [batch for batches in loader.held_out(6) for batch in batches]
    for name, loss in by_hand(splits, model, evaluated).items():
        found[f"eval/{name}/loss".replace("//", "/")] = {2: loss}
    return found


def test_every_strategy_records_what_the_examples_of_a_source_lose(
    launch: Launch, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32: 1e-5, and the sums of the sources are those of all."""
    monkeypatch.chdir(data)
    known = {packed: expected(() if packed else ("data.packing=false",)) for packed in (True, False)}
    for losses_of in known.values():
        names = ("loss", *(f"{source}/loss" for source in SOURCES))
        assert set(losses_of) == {f"{part}/{name}" for part in ("train", "eval") for name in names}
    for name, words in STRATEGIES.items():
        launch(*WORDS, *TRAIN, *words, f"run.dir={name}").expect(0)
        for metric, values in known["data.packing=false" not in words].items():
            assert losses(data / name, metric) == pytest.approx(values, rel=1e-5), (name, metric)


def test_an_evaluation_has_a_row_for_each_source_and_the_best_checkpoint_is_by_one(
    launch: Launch, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = ("checkpoint.every=1", "job.eval_every=1", "checkpoint.best_metric=max:pairs.jsonl/loss")
    learning = (*STRATEGIES["single"], *TRAIN[:-1], "optimizer.lr=1e-3", *best)
    launch(*WORDS, *learning, "run.dir=trained").expect(0)
    found = losses(data / "trained", "eval/pairs.jsonl/loss")
    assert set(found) == {1, 2}
    manifest = json.loads((data / "trained/checkpoints/step_00000001/manifest.json").read_text())
    assert manifest["eval_metrics"]["pairs.jsonl/loss"] == pytest.approx(found[1])
    measured = ("job=evaluate", "job.eval_sequences=6", "tracker=local", "checkpoint.resume=trained@best")
    launch(*WORDS, *STRATEGIES["single"], *measured, "run.dir=measured").expect(0)
    (again,) = losses(data / "measured", "eval/pairs.jsonl/loss").values()
    assert again == pytest.approx(found[1], rel=1e-6)
    table = (data / "measured/evaluation.md").read_text()
    tokens = {line.split("|")[1].strip(): int(line.split("|")[2].replace(",", "")) for line in table.splitlines()[4:]}
    assert tokens["held-out"] == tokens["chats.jsonl"] + tokens["pairs.jsonl"]
    other = (*learning[:-1], "checkpoint.best_metric=max:chats.jsonl/loss")  # the first sequence is of the pairs
    rare = launch(*WORDS, *other, "job.eval_sequences=1", "run.dir=rare")
    assert rare.returncode == 65, rare.stdout
    assert "none of the 1 sequences of an evaluation is of chats.jsonl" in rare.stdout + rare.stderr
