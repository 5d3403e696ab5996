"""A fresh process: load folders of weights and print a digest of what each computes. Arguments: LOADER FOLDER …"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch


def digest_of(model: torch.nn.Module) -> str:
    ids = torch.arange(48).view(2, 24) % 50
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    return hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()


def load(loader: str, folder: str) -> torch.nn.Module:
    if loader == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    from launcher.activation import Keep
    from launcher.attention import Sdpa
    from launcher.models.build import build_model
    from launcher.models.hf import Hf

    return build_model(Hf(name=folder), seed=0, attention=Sdpa(), activation=Keep())


if __name__ == "__main__":
    for loader, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(loader, Path(folder).name, digest_of(load(loader, folder)), flush=True)
