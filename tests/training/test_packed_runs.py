"""Runs on packed examples of a mixture: they continue in the middle of an epoch."""

import json

import pytest

from tests.helpers import losses

WORDS = (
    "data=auto",
    "data.weights=[3,1]",
    "data.chat_template=chatml",
    "data.vocab_size=300",
    "model.num_hidden_layers=2",
    "model.hidden_size=64",
    "model.max_position_embeddings=64",
    "job.sequence_length=64",
    "job.global_batch=8",
    "job.eval_sequences=8",
    "job.sample_tokens=0",
    "schedule.warmup_steps=2",
    "tracker=local",
    "parallel=ddp",
    "job.steps=8",
    "job.eval_every=4",
)


@pytest.fixture
def data(tmp_path):
    """Chats and prompts: at 8 rows a step, 3 steps are in the middle of an epoch of either."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"And {n}?"},
                {"role": "assistant", "content": f"It is {n + 1}." * (1 + n % 2)},
            ]
        }
        for n in range(300)
    ]
    pairs = [{"prompt": f"{n} and {n}?", "response": f"{2 * n}"} for n in range(120)]
    for name, rows in {"chats": chats, "pairs": pairs}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "data.path=[chats.jsonl,pairs.jsonl]"


def test_a_packed_mixture_continues_to_the_bit_and_alike_on_other_ranks(launch, tmp_path, data):
    """Two ranks again: every bit; one rank adds the same gradients in another order (fp32: 1e-6)."""
    words = (*WORDS, data, "checkpoint.every=3", "checkpoint.keep=0")
    ended = launch(*words, "run.dir=whole", "backend.ranks=2", "job.micro_batch=4").expect(0)
    assert "packed into" in ended.stdout
    whole = losses(tmp_path / "whole")
    after = {step: loss for step, loss in whole.items() if step > 3}
    resumed = "checkpoint.resume=whole/checkpoints/step_00000003"
    launch(*words, "run.dir=again", "backend.ranks=2", "job.micro_batch=4", resumed).expect(0)
    assert losses(tmp_path / "again") == after
    assert losses(tmp_path / "again", "eval/loss") == {
        step: loss for step, loss in losses(tmp_path / "whole", "eval/loss").items() if step > 3
    }
    launch(*words, "run.dir=one", "backend.ranks=1", "job.micro_batch=2", resumed).expect(0)
    assert losses(tmp_path / "one") == pytest.approx(after, rel=1e-6)
    assert losses(tmp_path / "one", "data/padding") == pytest.approx(
        {step: share for step, share in losses(tmp_path / "whole", "data/padding").items() if step > 3}
    )
