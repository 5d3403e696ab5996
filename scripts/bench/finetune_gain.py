"""What fine-tuning on chats brings: held-out loss and exact match before and after, LoRA beside full weights.

Goal: the gain of each figure is over twice its spread between seeds. The data is what ``data.path=chat-tasks`` names;
its last chats are held out, whose questions no other chat asks. An answer matches when it is the right one to the
character, generated greedily.

    python scripts/bench/finetune_gain.py --steps 60 precision=fp32
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import print_machine, run_to_end

from launcher.config.data.chat_tasks import chat_tasks

EXPERIMENTS = {"full weights": "finetune_smollm2", "LoRA": "lora_smollm2"}
MODEL = "smollm2_135m"
TOKENS = 32
"""Most tokens of an answer; the longest right one has fewer."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a model is on the held-out chats."""

    loss: float
    """Nats a token of the assistant's turns."""
    exact: float
    """Share of the last answers that are right."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The data, and how models are trained and scored on it."""

    folder: Path
    steps: int
    words: tuple[str, ...]
    """Overrides of every command."""

    def write(self, *, held_out: int) -> None:
        """Write chats to train on and those held out, and a prompt for the last answer of each."""
        rows = list(chat_tasks())
        write_lines(self.folder / "train.jsonl", rows[:-held_out])
        write_lines(self.folder / "held_out.jsonl", rows[-held_out:])
        prompts = [{"messages": row["messages"][:-1], "id": row["messages"][-1]["content"]} for row in rows[-held_out:]]
        write_lines(self.folder / "prompts.jsonl", prompts)

    def launch(self, name: str, *words: str) -> Path:
        """Run a job to its end; return its run directory."""
        run_dir = self.folder / name
        run_to_end([sys.executable, "-m", "launcher", *words, *self.words, "tracker=local", f"run.dir={run_dir}"])
        return run_dir

    @property
    def data(self) -> tuple[str, ...]:
        """Overrides that name the data; every held-out chat is evaluated."""
        paths = (f"data.path={self.folder / 'train.jsonl'}", f"data.eval_path={self.folder / 'held_out.jsonl'}")
        return (*paths, "data.tokenizer=model", "job.sequence_length=256", "job.eval_sequences=100000")

    def before(self) -> Score:
        """Return the score of the pretrained model."""
        evaluated = self.launch("before", "job=evaluate", f"model={MODEL}", *self.data)
        return Score(loss=last_loss(evaluated), exact=self.exact("before", f"model={MODEL}"))

    def after(self, experiment: str, seed: int) -> Score:
        """Return the score of a model that an experiment has trained."""
        name = f"{experiment}_{seed}"
        words = (f"+exp={experiment}", *self.data, f"job.steps={self.steps}", f"job.seed={seed}", "job.eval_every=0")
        trained = self.launch(name, *words, "job.sample_tokens=0", "checkpoint.every=0")
        return Score(loss=last_loss(trained), exact=self.exact(name, f"model={MODEL}", f"model.weights={trained}"))

    def exact(self, name: str, *model: str) -> float:
        """Return the share of held-out chats whose last answer a model gives to the character."""
        answers = self.folder / f"{name}.answers.jsonl"
        files = (f"job.input={self.folder / 'prompts.jsonl'}", f"job.output={answers}")
        self.launch(f"{name}_answers", "job=generate", *model, *files, "job.temperature=0", f"job.max_tokens={TOKENS}")
        found = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        num_right = sum(1 for one in found if one["text"].strip() == one["id"])
        return num_right / len(found)


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def last_loss(run_dir: Path) -> float:
    """Return the last held-out loss of a run."""
    loss: float = json.loads((run_dir / "result.json").read_text())["metrics"]["eval/loss"]
    return loss


def report(figure: str, gains: Sequence[float]) -> str:
    """Return a line about the gains of all seeds."""
    gain, spread = statistics.mean(gains), max(gains) - min(gains)
    verdict = "over" if gain > 2 * spread else "NOT over"
    return f"  {figure}: gain {gain:.3f}, spread {spread:.3f} over {len(gains)} seeds: {verdict} twice the spread"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="overrides of every command (precision=fp32)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=100, help="chats that are scored")
    given = parser.parse_args()
    print_machine("torch", "transformers", "peft")
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(folder=Path(root), steps=given.steps, words=tuple(given.words))
        bench.write(held_out=given.held_out)
        before = bench.before()
        print(f"before: held-out loss {before.loss:.4f}, exact match {before.exact:.1%}", flush=True)
        for label, experiment in EXPERIMENTS.items():
            scores = []
            for seed in range(given.seeds):
                scores.append(bench.after(experiment, seed))
                shown = f"held-out loss {scores[-1].loss:.4f}, exact match {scores[-1].exact:.1%}"
                print(f"{label}, seed {seed}, {given.steps} steps: {shown}", flush=True)
            print(report("held-out loss", [before.loss - one.loss for one in scores]))
            print(report("exact match", [one.exact - before.exact for one in scores]), flush=True)


if __name__ == "__main__":
    main()
