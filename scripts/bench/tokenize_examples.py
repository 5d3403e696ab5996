"""Rows a second and peak memory of tokenising chats, against ``datasets.map`` with as many processes.

Goal: at least as many rows a second. Both load the tokenizer, read the same JSON lines, render them by one template and
write tokens and a mask to disk; ``datasets.map`` lets Transformers make the mask, in batches, as TRL does. Each round
of each is a process of its own, in turn. On a machine that others use, the CPU seconds of all processes of a side are
the figure to compare.

    python scripts/bench/tokenize_examples.py --megabytes 1000 --processes 2
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

_WORDS = 20_000
_SIDES = ("launcher", "datasets")


def main() -> None:
    """Measure and print, or be one side of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=_SIDES)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.side is not None:
        {"launcher": by_launcher, "datasets": by_datasets}[given.side](given.folder, given.processes)
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        num_rows = write_chats(folder / "chats.jsonl", num_bytes=given.megabytes * 1_000_000)
        save_tokenizer(folder)
        size = (folder / "chats.jsonl").stat().st_size / 1e6
        print(f"{num_rows:,} chats, {size:,.0f} MB of JSON lines, {given.processes} processes")
        found: dict[str, list[Measured]] = {side: [] for side in _SIDES}
        for _ in range(given.rounds):
            for side in _SIDES:
                found[side].append(measured(side, folder, given.processes))
                print(f"  {side}: {found[side][-1]}", flush=True)
        for side, taken in found.items():
            print(f"{side}: {num_rows / median(taken, 'seconds'):,.0f} rows/s, {middle(taken)}")
        for name in ("seconds", "cpu_seconds", "peak_bytes"):
            ratio = median(found["launcher"], name) / median(found["datasets"], name)
            print(f"launcher / datasets, {name}: {ratio:.3f} (goal: at most 1)")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One round of one side."""

    seconds: float
    """After imports."""
    cpu_seconds: float
    """Of all its processes, from their start."""
    peak_bytes: float
    """Of all its processes together."""

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.cpu_seconds:.1f} CPU seconds, peak {self.peak_bytes / 1e6:,.0f} MB"


def median(taken: Sequence[Measured], name: str) -> float:
    """Return the median of a figure."""
    return float(statistics.median(getattr(one, name) for one in taken))


def middle(taken: Sequence[Measured]) -> Measured:
    """Return the median of each figure."""
    return Measured(**{each.name: median(taken, each.name) for each in fields(Measured)})


def write_chats(file: Path, *, num_bytes: int) -> int:
    """Write random chats of a few hundred words; return how many."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(_WORDS)]
    weights = [1 / (rank + 1) for rank in range(_WORDS)]
    pool = chance.choices(words, weights, k=1_000_000)
    num_rows = 0
    with file.open("w") as stream:
        while stream.tell() < num_bytes:
            messages = []
            for role in ("user", "assistant") * chance.randint(1, 3):
                start, length = chance.randrange(900_000), chance.randint(10, 200)
                messages.append({"role": role, "content": " ".join(pool[start : start + length])})
            stream.write(json.dumps({"messages": messages}) + "\n")
            num_rows += 1
    return num_rows


def save_tokenizer(folder: Path) -> None:
    """Train a BPE on the first chats and save it with a chat template."""
    from transformers import PreTrainedTokenizerFast

    from launcher.config.data.bpe import END, train_byte_level_bpe
    from launcher.config.data.chat_template import builtin_template

    with (folder / "chats.jsonl").open() as stream:
        lines = [line for line, _ in zip(stream, range(2000), strict=False)]
    inner = train_byte_level_bpe(lines, vocab_size=8192)
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    tokenizer.chat_template = builtin_template("chatml")
    tokenizer.save_pretrained(folder / "tokenizer")


def measured(side: str, folder: Path, processes: int) -> Measured:
    """Run one side: the seconds that it says it took, its CPU seconds, and its most memory."""
    import psutil

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--processes", str(processes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        peak = 0.0
        while running.poll() is None:
            peak = max(peak, _tree_bytes(psutil.Process(running.pid)))
            time.sleep(0.2)
        assert running.stdout is not None, "it has a pipe"
        printed = running.stdout.read().splitlines()
    assert running.returncode == 0, printed
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds=float(printed[-1]), cpu_seconds=cpu, peak_bytes=peak)


def _tree_bytes(process: Any) -> float:
    """Return the proportional set size of a process and its children: pages that they share count once."""
    import psutil

    total = 0.0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().pss
    except psutil.NoSuchProcess:
        return total
    return total


def by_launcher(folder: Path, processes: int) -> None:
    """Tokenise as a run does, into an empty cache."""
    from transformers import AutoTokenizer  # noqa: F401  (imported before the clock starts, as the other side does)

    from launcher.config.data.auto import AutoData
    from launcher.config.model.gpt2 import Gpt2
    from launcher.data.example_encoding import example_folders

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        data = AutoData(path=str(folder / "chats.jsonl"), tokenizer=str(folder / "tokenizer"), cache=cache)
        model = Gpt2(name="small", num_hidden_layers=1, num_attention_heads=2, hidden_size=8)
        started = time.perf_counter()
        example_folders(data, model, heartbeat=lambda: None, processes=processes)
        print(time.perf_counter() - started)


def by_datasets(folder: Path, processes: int) -> None:
    """Tokenise by ``datasets.map``, from JSON lines to Arrow files."""
    import datasets
    from transformers import AutoTokenizer

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def encoded(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        answer = tokenizer.apply_chat_template(
            rows["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        return {"input_ids": answer["input_ids"], "assistant_masks": answer["assistant_masks"]}

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        rows = datasets.load_dataset("json", data_files=str(folder / "chats.jsonl"), split="train", cache_dir=cache)
        rows.map(encoded, batched=True, num_proc=processes, remove_columns=rows.column_names)
        print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
