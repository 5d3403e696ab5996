"""torch's random generators, saved rank by rank: dropout continues where it stopped."""

from __future__ import annotations

from pathlib import Path

import torch

from launcher.engines.unpickling import load_file, named


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rng_{rank:05d}.pt"


def save_rng(folder: Path, *, rank: int, device: torch.device) -> None:
    """Write the state of this rank's generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    torch.save(state, _file(folder, rank))


def load_rng(folder: Path, *, rank: int, device: torch.device) -> None:
    """Restore them; a rank that did not exist when the checkpoint was written keeps its own."""
    path = _file(folder, rank)
    if not path.exists():
        return
    state = load_file(path)
    with named(path):
        torch.set_rng_state(state["cpu"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
