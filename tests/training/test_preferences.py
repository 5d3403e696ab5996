"""Training on preferences: TRL's numbers, one process's under every strategy, and what a resumed run knows."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launcher.config.compose import compose
from launcher.config.data.chat_template import find_template
from launcher.data.dataset import open_run_splits
from launcher.data.rows import PairRows
from tests.conftest import Launch
from tests.helpers import losses

STEPS = 4
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
WORDS = (
    *("data=auto", "data.path=pairs.jsonl", "data.chat_template=chatml", "data.vocab_size=400", "data.cache=cache"),
    *("model=hf", "model.name=model", "model.weights=pretrained", "precision=fp32"),
    *("job.sequence_length=64", "job.global_batch=8", "job.eval_sequences=4", "job.sample_tokens=0"),
    *("optimizer.lr=1e-3", "optimizer.weight_decay=0", "optimizer.betas=[0.9,0.999]", "optimizer.eps=1e-8"),
    *("schedule=constant", "tracker=local", f"job.steps={STEPS}", "job.eval_every=2"),
)


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Pairs in pairs.jsonl, and the model that begins, in the folder model."""
    found = []
    for number in range(40):
        good, bad = f"It is {number + 1}.", f"It is {number - 1}" + " or so" * (number % 3) + "."
        found.append(
            {
                "prompt": [{"role": "user", "content": f"What follows {number}?"}],
                "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}],
            }
        )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=400, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return found


def rewards(run_dir: Path) -> list[dict[int, float]]:
    return [losses(run_dir, name) for name in REWARDS]


def trl_log(folder: Path, ordered: list[dict[str, Any]], template: str) -> list[dict[str, float]]:
    """Return what TRL logs of each step on these pairs in their order."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    (file,) = (folder / "cache").glob("*/tokenizer.json")
    inner = PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=template)
    inner.pad_token = inner.eos_token = inner.convert_ids_to_tokens(0)
    options = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        max_length=65,
    )
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    trainer = InOrder(model, args=options, train_dataset=Dataset.from_list(ordered), processing_class=inner)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def test_losses_and_rewards_are_those_of_trl(
    launch: Launch, tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 on one process; the same pairs in the same micro-batches: 1e-5."""
    launch(*WORDS, "run.dir=ours", "parallel=single", "backend.ranks=1", "job.micro_batch=4").expect(0)
    monkeypatch.chdir(tmp_path)
    run = compose([*WORDS, "parallel=single", "backend.ranks=1", "job.micro_batch=4"]).run
    splits = open_run_splits(run)
    assert isinstance(splits.train, PairRows)
    drawn = [splits.train_order.index(run.job.seed, position) for position in range(8 * STEPS)]
    ordered = [rows[splits.train.number(index)] for index in drawn]
    template = find_template("chatml", None)
    assert template is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logged = trl_log(tmp_path, ordered, template.source)
    steps = range(1, STEPS + 1)
    assert len(logged) == STEPS
    ours = losses(tmp_path / "ours")
    for step, entry in zip(steps, logged, strict=True):
        assert ours[step] == pytest.approx(entry["loss"], rel=1e-5)
        assert losses(tmp_path / "ours", "train/grad_norm")[step] == pytest.approx(entry["grad_norm"], rel=1e-4)
        for name in REWARDS:
            assert losses(tmp_path / "ours", name)[step] == pytest.approx(entry[name], rel=1e-4, abs=2e-6), name
    assert ours[STEPS] < 0.6


def test_strategies_give_the_numbers_of_one_process(launch: Launch, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """fp32: 1e-5, as what steps make of rounding; of evaluations 3e-5, whose sums are of many tokens."""
    launch(*WORDS, "run.dir=one", "parallel=single", "backend.ranks=1", "job.micro_batch=4").expect(0)
    one = tmp_path / "one"
    for strategy in ("ddp", "fsdp", "zero2", "zero3"):
        launch(*WORDS, f"run.dir={strategy}", f"parallel={strategy}", "backend.ranks=2", "job.micro_batch=2").expect(0)
        two = tmp_path / strategy
        assert losses(two) == pytest.approx(losses(one), rel=1e-5), strategy
        assert losses(two, "eval/loss") == pytest.approx(losses(one, "eval/loss"), rel=3e-5), strategy
        assert losses(two, "train/tokens") == losses(one, "train/tokens")
        for mine, other in zip(rewards(two), rewards(one), strict=True):
            assert mine == pytest.approx(other, rel=1e-4, abs=1e-5), strategy


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_resumed_run_keeps_its_reference(
    launch: Launch, tmp_path: Path, rows: list[dict[str, Any]], adapter: str
) -> None:
    words = (*WORDS, f"adapter={adapter}", "parallel=single", "backend.ranks=1", "job.micro_batch=4")
    ended = launch(*words, "run.dir=whole", "checkpoint.every=2", "checkpoint.keep=0").expect(0)
    assert "computing the log-probabilities of 40 pairs" in ended.stdout
    padding = losses(tmp_path / "whole", "data/padding").values()
    (said,) = re.findall(r"an answer on average, batched by length, ([\d.]+)% padding", ended.stdout)
    assert float(said) == pytest.approx(100 * sum(padding) / len(padding), abs=0.06)
    expected = {step: loss for step, loss in losses(tmp_path / "whole").items() if step > 2}
    assert losses(tmp_path / "whole")[1] == pytest.approx(0.693147, rel=1e-5)
    resumed = (*words, "run.dir=again", "checkpoint.resume=whole/checkpoints/step_00000002")
    again = launch(*resumed).expect(0)
    assert "computing" not in again.stdout
    assert losses(tmp_path / "again") == expected
    (tmp_path / "whole" / "reference.safetensors").unlink()
    if adapter == "none":
        refused = launch("resume", "whole", "job.steps=6").expect(65)
        assert "start another run" in refused.output
    if adapter == "lora":  # the base model is there still
        third = launch(*words, "run.dir=third", "checkpoint.resume=whole/checkpoints/step_00000002").expect(0)
        assert "computing" in third.stdout
        assert losses(tmp_path / "third") == pytest.approx(expected, rel=1e-6)
        own = [word for word in words if word != "adapter=lora"]
        launch(*own, "run.dir=next", "model.adapter=whole", "job.steps=1").expect(0)
        assert losses(tmp_path / "next")[1] == pytest.approx(0.693147, rel=1e-5)  # that adapter is the reference
