"""CTranslate2 decoding the same prompts, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from launcher.errors import JobError

_PROGRAM = """
import json, sys, time
import ctranslate2

asked = json.load(sys.stdin)
generator = ctranslate2.Generator(asked["folder"], device="cpu", compute_type="int8", intra_threads=asked["threads"])
with open(asked["folder"] + "/vocabulary.json", encoding="utf-8") as file:
    vocabulary = json.load(file)
rows = [[vocabulary[(7 * (r * asked["prompt"] + k) + 11) % len(vocabulary)] for k in range(asked["prompt"])]
        for r in range(asked["batch"])]

def go(new):
    started = time.perf_counter()
    found = generator.generate_batch(rows, max_length=new, min_length=new, sampling_topk=1, beam_size=1,
                                     include_prompt_in_result=False, max_batch_size=0)
    return time.perf_counter() - started, [answer.sequences_ids[0] for answer in found]

for _ in range(asked["warmup"]):
    go(asked["tokens"] + 1)
one, _ = go(1)
all_, chosen = go(asked["tokens"] + 1)
print(json.dumps({"one": one, "all": all_, "chosen": chosen}))
"""


def decode_by_peer(python: str, folder: str, *, batch: int, prompt: int, tokens: int, warmup: int) -> dict[str, Any]:
    """Return what :func:`launcher.benchmarks.decoding.decode` does; its time is that of many tokens less that of one.

    Raises:
        JobError: it cannot be run.
    """
    import hashlib

    import torch

    where = Path(folder).expanduser()
    asked = {
        "folder": str(where),
        "threads": torch.get_num_threads(),
        "batch": batch,
        "prompt": prompt,
        "tokens": tokens,
        "warmup": max(1, warmup),
    }
    command = [str(Path(python).expanduser()), "-c", _PROGRAM]
    try:
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    except OSError as error:
        raise JobError(f"CTranslate2 cannot be started: {error}") from error
    if done.returncode:
        raise JobError(f"CTranslate2 ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "token_s": (found["all"] - found["one"]) / tokens,
        "prefill_per_s": batch * prompt / found["one"],
        "first_s": found["one"],
        "read_bytes": (where / "model.bin").stat().st_size,
        "digest": hashlib.sha256(repr(found["chosen"]).encode()).hexdigest()[:16],
    }
