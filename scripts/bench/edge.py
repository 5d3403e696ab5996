"""One model in the formats of phones and small machines: size, speed and memory on one thread, and what is lost.

Each row exports the model (``launch export … check=true``), whose line says how the format's own runtime compares, and
runs it twice more in a process of its own: a prompt of 128 tokens with one token, and with 65. Speeds are by the
processor time of one thread, so that other work on the machine changes them little.

    python scripts/bench/edge.py MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import print_machine

from launcher.config.export import FORMATS, GGUF, SAFETENSORS

PROMPT, TOKENS = 128, 64
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one export measures."""

    format: str
    dtype: str
    num_bytes: int
    equal: str
    """Greedy tokens that are the model's, of all: ``48 of 48``."""
    kl: str
    prefill: float
    """Tokens of the prompt a second."""
    decode: float
    """Tokens a second."""
    peak_bytes: int

    def line(self) -> str:
        """Return the row of a table."""
        sizes = f"{self.num_bytes / 1e6:.0f} MB | {self.peak_bytes / 1e6:.0f} MB"
        speeds = f"{self.prefill:.0f} | {self.decode:.0f}"
        return f"| `{self.format}` | `{self.dtype}` | {sizes} | {speeds} | {self.equal} | {self.kl} |"


def measure(model: Path, folder: Path, *, form: str, dtype: str) -> Row:
    """Export a model in one format, and run what was written."""
    target = folder / f"{form}_{dtype}{'.gguf' if form == GGUF else ''}"
    words = ["export", str(model), str(target), f"format={form}", f"dtype={dtype}"]
    ended = subprocess.run(
        [sys.executable, "-m", "launcher", *words], capture_output=True, text=True, check=False, cwd=folder
    )
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)}: {ended.stderr}")
    print(ended.stdout, end="", file=sys.stderr, flush=True)
    found = re.search(r"(\d+ of \d+) greedy tokens are the model's, KL divergence ([\d.e-]+);", ended.stdout)
    short, long = (
        min((run(form, target, tokens=tokens) for _ in range(REPEATS)), key=lambda answer: answer["cpu_s"])
        for tokens in (1, 1 + TOKENS)
    )
    files = [target] if target.is_file() else [file for file in target.rglob("*") if file.is_file()]
    return Row(
        format=form,
        dtype=dtype,
        num_bytes=sum(file.stat().st_size for file in files),
        equal=found[1] if found else "not checked",
        kl=found[2] if found else "",
        prefill=PROMPT / short["cpu_s"],
        decode=TOKENS / (long["cpu_s"] - short["cpu_s"]),
        peak_bytes=int(long["peak_bytes"]),
    )


def run(form: str, target: Path, *, tokens: int) -> dict[str, float]:
    """Return what a format's runtime answers to a prompt, with its processor time."""
    request = {
        "format": form,
        "path": str(target),
        "prompts": [list(range(100, 100 + PROMPT))],
        "text": "a",
        "num_tokens": tokens,
        "num_probs": 0,
        "threads": 1,
    }
    command = [sys.executable, "-m", "launcher.verification.runtime"]
    ended = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=True)
    answer: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return answer


def rows(model: Path, formats: list[str]) -> Iterator[Row]:
    """Yield a row for each format and its kinds of weights."""
    with tempfile.TemporaryDirectory() as folder:
        for form in formats:
            for dtype in FORMATS[form].dtypes:
                yield measure(model, Path(folder), form=form, dtype=dtype)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--formats", nargs="+", default=[name for name in FORMATS if name != SAFETENSORS])
    arguments = parser.parse_args()
    print_machine("torch", "gguf", "xllamacpp", "onnxruntime-genai", "openvino-genai")
    print("\n| `format=` | `dtype=` | files | peak memory | prompt, tokens/s | decode, tokens/s | greedy tokens | KL |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows(arguments.model.absolute(), arguments.formats):
        print(row.line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
