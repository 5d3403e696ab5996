"""Fine-tune a small Llama by the launcher's engine and by TRL's SFTTrainer; print the loss of each step of both.

    python sft_beside_trl.py FOLDER

TRL reads the same rows, in the order in which the launcher draws them, and does all else itself: template, tokens,
labels, batches, loss, gradients, updates. It prints a JSON object: case -> side -> losses.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import transformers

from launcher.config.compose import compose
from launcher.config.data.bpe import END, train_byte_level_bpe
from launcher.config.data.chat_tasks import chat_tasks
from launcher.config.data.chat_template import builtin_template
from launcher.data.dataloader import Loader
from launcher.data.dataset import Splits, open_run_splits
from launcher.engines.base import make_engine
from launcher.engines.context import Context
from launcher.execution.run_references import resolve_run_references
from launcher.protocol.rundir import RunDir

LR, CLIP_NORM, DECAY, LENGTH = 3e-3, 0.5, 0.1, 160
WORDS = (
    *("parallel=single", "backend.ranks=1", "precision=fp32", "schedule=constant", "tracker=local", "model=hf"),
    *("model.name=./base", "data=auto", "data.tokenizer=model", "data.cache=cache", f"job.sequence_length={LENGTH}"),
    *(f"optimizer.lr={LR}", f"job.clip_norm={CLIP_NORM}", f"optimizer.weight_decay={DECAY}", "job.seed=3"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to fine-tune."""

    file: str = "chats.jsonl"
    words: tuple[str, ...] = ("data.packing=false",)
    micro_batch: int = 2
    accumulation: int = 2
    steps: int = 5
    trl: dict[str, Any] = field(default_factory=lambda: {"assistant_only_loss": True})
    laid_out: bool = False
    """TRL gets rows of several examples as the launcher packs them."""
    adapter: bool = False


PAIRS = {"completion_only_loss": True}
CASES = {
    "turns": Case(),
    "all tokens": Case(words=("data.packing=false", "data.train_on=all"), trl={}),
    "pairs": Case(file="pairs.jsonl", trl=PAIRS),
    "plain pairs": Case(file="pairs.jsonl", words=("data.packing=false", "data.chat_template=none"), trl=PAIRS),
    "packed": Case(words=("data.packing=true",), accumulation=1, laid_out=True),
    "whole set packed": Case(words=("data.packing=true",), micro_batch=0, accumulation=1, steps=3),
    "adapter": Case(words=("data.packing=false", "model.adapter=adapter"), adapter=True),
}
"""``micro_batch`` 0: every step takes all of the data, however each side packs it."""


class QuietClock:
    """Times nothing."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Any:
        yield


def make_base() -> None:
    """Write a model with its tokenizer, the data and an adapter."""
    rows = list(chat_tasks(24))
    write_rows(Path("chats.jsonl"), rows)
    turns = [[turn["content"] for turn in row["messages"]] for row in rows]
    write_rows(Path("pairs.jsonl"), [{"prompt": prompt, "response": answer} for prompt, answer, *_ in turns])
    inner = train_byte_level_bpe([json.dumps(row) for row in rows], vocab_size=400)
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    tokenizer.chat_template = builtin_template("chatml")
    tokenizer.save_pretrained("base")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    sizes |= {"intermediate_size": 128, "max_position_embeddings": 1 << 13, "vocab_size": inner.get_vocab_size()}
    end = tokenizer.eos_token_id
    config = transformers.LlamaConfig(**sizes, bos_token_id=end, eos_token_id=end, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained("base")
    import peft

    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained("adapter")


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_launcher(case: Case) -> tuple[list[float], list[list[int]]]:
    """Return the losses, and the numbers of the examples in each row that the steps draw."""
    words = [*WORDS, f"data.path={case.file}", f"data.eval_path={case.file}", *case.words]
    run = resolve_run_references(compose([*words, "job.micro_batch=1"]))
    splits = open_run_splits(run)
    micro_batch = case.micro_batch or splits.train.num_sequences
    sizes = [f"job.micro_batch={micro_batch}", f"job.global_batch={micro_batch * case.accumulation}"]
    run = resolve_run_references(compose([*words, *sizes]))
    update = lambda *args, **numbers: None  # noqa: E731
    context = Context(
        run=run,
        run_dir=RunDir(Path("run")),
        rank=0,
        local_rank=0,
        world_size=1,
        heartbeat=SimpleNamespace(update=update),
    )
    loader = Loader(splits, context.batch, seed=run.job.seed, rank=0)
    with make_engine(context, QuietClock()) as engine:
        losses = [engine.step(loader.step(step), lr=LR).loss for step in range(case.steps)]
    drawn = case.steps * context.batch.global_batch
    return losses, [rows_of(splits, run.job.seed, position) for position in range(drawn)]


def rows_of(splits: Splits, seed: int, position: int) -> list[int]:
    """Return the examples of the row at a position of the run; all examples train, so numbers are those of rows."""
    return splits.train.examples(splits.train_order.index(seed, position)).tolist()


def by_trl(case: Case, drawn: list[list[int]]) -> list[float]:
    """Return the losses of TRL on the same rows."""
    import peft
    import trl

    rows = [json.loads(line) for line in Path(case.file).read_text().splitlines()]
    if case.file == "pairs.jsonl":
        is_plain = "data.chat_template=none" in case.words
        rows = [
            {"prompt": row["prompt"], "completion": row["response"]}
            if is_plain
            else {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["response"]}],
            }
            for row in rows
        ]
    model: Any = transformers.LlamaForCausalLM.from_pretrained("base", dtype=torch.float32)
    if case.adapter:
        model = peft.PeftModel.from_pretrained(model, "adapter", is_trainable=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained("base")

    def trainer(dataset: datasets.Dataset, **options: Any) -> trl.SFTTrainer:
        arguments = trl.SFTConfig(
            output_dir="trl",
            max_steps=case.steps,
            gradient_accumulation_steps=case.accumulation,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=DECAY,
            max_grad_norm=CLIP_NORM,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=3,
            **{"per_device_train_batch_size": case.micro_batch, "max_length": None, **case.trl, **options},
        )
        return trl.SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)

    if not case.micro_batch:
        packed = trainer(
            datasets.Dataset.from_list(rows), packing=True, max_length=LENGTH, per_device_train_batch_size=1
        )
        whole = len(packed.train_dataset)
        assert whole > 1
        made = trainer(
            datasets.Dataset.from_list(rows), packing=True, max_length=LENGTH, per_device_train_batch_size=whole
        )
    elif case.laid_out:
        tokenized = trainer(datasets.Dataset.from_list(rows)).train_dataset
        rows = [joined(tokenized, row) for row in drawn]
        made = trainer(datasets.Dataset.from_list(rows), padding_free=True, assistant_only_loss=False)
    else:
        made = trainer(datasets.Dataset.from_list([rows[number] for (number,) in drawn]))
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def joined(tokenized: datasets.Dataset, numbers: list[int]) -> dict[str, list[int]]:
    """Return a packed row of TRL's own tokens and labels."""
    parts = [tokenized[number] for number in numbers]
    return {
        "input_ids": [token for part in parts for token in part["input_ids"]],
        "labels": [label for part in parts for label in part["labels"]],
        "seq_lengths": [len(part["input_ids"]) for part in parts],
    }


def main(folder: str) -> None:
    """Print the losses of all cases."""
    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    make_base()
    found = {}
    for name, case in CASES.items():
        ours, drawn = by_launcher(case)
        found[name] = {"launcher": ours, "trl": by_trl(case, drawn)}
    Path("losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
