"""Tokens a second and peak memory of fine-tuning on chats, all weights and LoRA, beside TRL with accelerate.

Goals: at least as many tokens a second, at most as much memory. Weights are random, of the size of SmolLM2-135M. Both
sides get the same chats in the same order, one a row, so that every batch is the same to the token; with ``--packed``
each packs them in its own way, and tokens are those of the chats. Runs are whole and in turn, A B A B; the first steps
of each are left out, and with them TRL's tokenisation: the launcher finds its tokens in the cache. Memory is the peak
of rank 0: of its GPU, or of its process where there is none.

    python scripts/bench/sft_beside_trl.py --precision bf16 --ranks 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from harness import BIN, alternate, print_machine, step_times

from launcher.config.data.chat_tasks import chat_tasks

HERE = Path(__file__).resolve().parent
SKIP = 3
SIZES = {
    "smollm2_135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    | {"num_attention_heads": 9, "num_key_value_heads": 3},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """One fine-tuning, for both sides."""

    model: str
    rows: str
    adapter: str
    packed: bool
    precision: str
    ranks: int
    threads: int
    steps: int
    micro_batch: int
    accumulation: int
    sequence_length: int
    lr: float = 1e-5

    @property
    def global_batch(self) -> int:
        """Rows of a step."""
        return self.ranks * self.micro_batch * self.accumulation

    def overrides(self) -> list[str]:
        """Return it in the launcher's words, with everything off that TRL is set not to do."""
        return [
            *("model=hf", f"model.name={self.model}", f"adapter={self.adapter}", f"precision={self.precision}"),
            *(f"data.path={self.rows}", f"data.eval_path={self.rows}", "data.tokenizer=model"),
            *(f"data.packing={str(self.packed).lower()}", f"data.cache={Path(self.rows).parent / 'cache'}"),
            *(f"job.micro_batch={self.micro_batch}", f"job.global_batch={self.global_batch}"),
            *(f"job.sequence_length={self.sequence_length}", f"job.steps={self.steps}", "job.eval_every=0"),
            *("job.eval_sequences=1", "job.sample_tokens=0", "checkpoint.every=0", "checkpoint.at_end=false"),
            *(f"optimizer.lr={self.lr}", "schedule=constant", "schedule.warmup_steps=0", "tracker=local"),
            *(f"parallel={'single' if self.ranks == 1 else 'ddp'}", f"backend.ranks={self.ranks}"),
            f"backend.threads={self.threads}",
        ]


def make_model(folder: Path, size: str, texts: list[str]) -> None:
    """Write a model with random weights and a tokenizer with a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from launcher.config.data.bpe import END, train_byte_level_bpe
    from launcher.config.data.chat_template import builtin_template

    inner = train_byte_level_bpe(texts, vocab_size=1000)
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    tokenizer.chat_template = builtin_template("chatml")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        **SIZES[size], max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def order_rows(work: Work, ordered: Path) -> list[int]:
    """Write the chats in the order in which the launcher draws them; return the tokens of each of its steps."""
    from launcher.config.compose import compose
    from launcher.data.dataset import open_run_splits
    from launcher.data.rows import ExampleRows
    from launcher.execution.run_references import resolve_run_references

    run = resolve_run_references(compose(work.overrides()))
    splits = open_run_splits(run)
    assert isinstance(splits.train, ExampleRows), "the data has examples"
    lines = Path(work.rows).read_text(encoding="utf-8").splitlines(keepends=True)
    steps = [
        [splits.train_order.index(run.job.seed, step * work.global_batch + at) for at in range(work.global_batch)]
        for step in range(work.steps)
    ]
    chosen = (number for rows in steps for row in rows for number in splits.train.examples(row))
    ordered.write_text("".join(lines[number] for number in chosen), encoding="utf-8")
    return [sum(splits.train.num_tokens(row) for row in rows) for rows in steps]


def metrics_of(file: Path, name: str) -> list[float]:
    """Return what a run recorded under a name, step by step."""
    lines = (json.loads(line) for line in file.read_text().splitlines())
    return [line[name] for line in lines if name in line]


class Comparison:
    """Both sides of one work, run in turn."""

    def __init__(self, work: Work, folders: Iterator[Path]) -> None:
        self._work, self._folders = work, folders
        ordered = next(folders).with_suffix(".jsonl")
        self._tokens = order_rows(work, ordered)
        self._trl = replace(work, rows=str(ordered))
        self.peaks: dict[str, list[float]] = {"launcher": [], "TRL": []}

    def launcher(self) -> float:
        """Return its tokens a second."""
        folder = next(self._folders)
        command = [sys.executable, "-m", "launcher", *self._work.overrides(), f"run.dir={folder}"]
        return self._rate("launcher", command, folder / "metrics.jsonl", env={})

    def trl(self) -> float:
        """Return TRL's tokens a second."""
        folder = next(self._folders)
        folder.mkdir()
        accelerate = [str(BIN / "accelerate"), "launch", "--num_machines=1", f"--num_processes={self._work.ranks}"]
        accelerate += ["--mixed_precision=no", "--dynamo_backend=no"]  # the trainer itself sets the precision
        accelerate += ["--multi_gpu"] if self._work.ranks > 1 and has_gpu() else []
        accelerate += [] if has_gpu() else ["--cpu"]
        metrics = folder / "metrics.jsonl"
        env = {"BENCH_SFT": json.dumps(asdict(self._trl)), "BENCH_METRICS": str(metrics)}
        env |= {"OMP_NUM_THREADS": str(self._work.threads)}
        return self._rate("TRL", [*accelerate, str(HERE / "trl_trainer.py")], metrics, env=env)

    def _rate(self, side: str, command: list[str], metrics: Path, *, env: dict[str, str]) -> float:
        times = step_times(command, metrics=metrics, env=env)
        self.peaks[side].append(metrics_of(metrics, "memory/peak_bytes")[-1])
        tokens = self._tokens
        if self._work.packed and side == "TRL":
            so_far = metrics_of(metrics, "num_tokens")
            tokens = [int(after - before) for before, after in itertools.pairwise([0, *so_far])]
        return sum(tokens[SKIP:]) / (times[-1] - times[SKIP - 1])


def has_gpu() -> bool:
    """Return whether a GPU is used."""
    import torch

    return bool(torch.cuda.is_available())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smollm2_135m")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--packed", action="store_true", help="several chats a row, packed by each side")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    given = parser.parse_args()
    print_machine("torch", "transformers", "trl", "accelerate", "peft")
    with tempfile.TemporaryDirectory() as root:
        folders = (Path(root) / str(number) for number in itertools.count())
        rows = [json.dumps(row) + "\n" for row in chat_tasks()]
        chats, model = Path(root) / "chats.jsonl", Path(root) / "model"
        chats.write_text("".join(rows), encoding="utf-8")
        make_model(model, given.size, rows)
        for adapter, label in (("none", "all weights"), ("lora", "LoRA")):
            work = Work(
                model=str(model),
                rows=str(chats),
                adapter=adapter,
                packed=given.packed,
                precision=given.precision,
                ranks=given.ranks,
                threads=given.threads,
                steps=given.steps,
                micro_batch=given.micro_batch,
                accumulation=given.accumulation,
                sequence_length=given.sequence_length,
            )
            print(f"{label}: {work}", flush=True)
            both = Comparison(work, folders)
            rates = alternate({"launcher": both.launcher, "TRL": both.trl}, rounds=given.rounds, unit="tokens/s")
            peaks = {side: statistics.median(values) for side, values in both.peaks.items()}
            shown = ", ".join(f"{side} {peak / 1e6:,.0f} MB" for side, peak in peaks.items())
            print(
                f"{label}: launcher / TRL = {rates['launcher'] / rates['TRL']:.3f} of the tokens/s (goal: at least 1)"
            )
            print(f"{label}: peaks {shown}: {peaks['launcher'] / peaks['TRL']:.3f} (goal: at most 1)\n", flush=True)


if __name__ == "__main__":
    main()
