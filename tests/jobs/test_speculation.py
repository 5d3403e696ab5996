"""Exits are trained, and then draft the same answers as the whole model gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ONE_RANK = ("tracker=local", "backend.threads=1", "backend.ranks=1", "parallel=single", "precision=fp32")
TRAIN = (
    *("+exp=early_exit_smollm2", "model=llama_tiny", "model.num_hidden_layers=4", "data.path=chats.jsonl"),
    *(
        "data.tokenizer=bpe",
        "data.vocab_size=300",
        "data.chat_template=plain",
        "job.steps=12",
        "job.sequence_length=64",
    ),
    *("job.global_batch=2", "job.sample_tokens=0", "job.eval_sequences=2", "checkpoint.every=0", "optimizer.lr=1e-2"),
)


def test_a_run_with_exits_drafts_and_answers_as_without(launch: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "as it is, as it is"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 40)
    launch(*TRAIN, *ONE_RANK, "run.dir=trained").expect(0)
    rows = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    prompts = [{"prompt": f"{text} it", "id": number} for number, text in enumerate(["Say", "as", "is"])]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    generate = ("job=generate", "model.weights=trained", "job.input=prompts.jsonl", "job.max_tokens=40", *ONE_RANK)
    launch(*generate, "run.dir=plain").expect(0)
    drafts = ("job.speculation=early_exit", "job.speculation_layers=2", "job.speculation_adaptive=false")
    drafted = launch(*generate, *drafts, "run.dir=drafted").expect(0)
    answers = [(tmp_path / name / "generated.jsonl").read_bytes() for name in ("plain", "drafted")]
    assert answers[0] == answers[1]
    assert "drafted tokens accepted; " in drafted.output
    row = json.loads((tmp_path / "drafted" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < row["generate/acceptance"] <= 1
    # of four layers two draft: half a pass for each of at most four drafts, and one to verify
    assert 3 / 5 <= row["generate/layer_share"] <= 3
