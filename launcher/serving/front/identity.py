"""What decides the answers of a server besides the request: a hash of weights, formats and tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.files import sha256_of
from launcher.schema import to_tree
from launcher.serving.values import Sampling

if TYPE_CHECKING:
    from launcher.config import Run

_BLOCK = 1 << 22


def identity_of(run: Run, *, tokenizer: str, beat: Callable[[], None]) -> str:
    """Return a hash that changes when the same request may get another answer. Reads all weights once.

    Args:
        run: the model, how it is computed, and by which engine.
        tokenizer: fingerprint of the tokenizer.
        beat: called meanwhile.
    """
    computed = {
        name: to_tree(getattr(run, name)) for name in ("model", "parallel", "precision", "attention", "compile")
    }
    job = to_tree(run.job)
    parts = {
        **computed,
        "engine": [job["engine"], job["batching"]],
        "weights": _weights(run, beat=beat),
        "tokenizer": tokenizer,
    }
    return sha256_of(json.dumps(parts, sort_keys=True).encode())


def _weights(run: Run, *, beat: Callable[[], None]) -> str:
    """Return a hash of the weights, or what random ones are drawn from."""
    if run.job.kind == "serve" and to_tree(run.job)["engine"] == "echo":
        return "none"
    folder = run.model.weights_folder(beat=beat)
    if folder is None:
        return f"random {run.job.seed} {json.dumps(run.model.architecture(), sort_keys=True)}"
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                beat()
    return digest.hexdigest()


def key_of(identity: str, prompt: Sequence[int], sampling: Sampling, stops: Sequence[str]) -> str:
    """Return the key of one sequence's result: everything that decides it."""
    parts = [identity, list(prompt), asdict(sampling), sorted(stops)]
    return sha256_of(json.dumps(parts, separators=(",", ":")).encode())
