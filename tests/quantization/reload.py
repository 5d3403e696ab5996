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
    from launcher.config.activation import NoCheckpointing
    from launcher.config.attention import SdpaAttention
    from launcher.config.model.hf import Hf
    from launcher.models.build import build_model

    return build_model(Hf(name=folder), seed=0, attention=SdpaAttention(), activation=NoCheckpointing())


if __name__ == "__main__":
    for loader, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(loader, Path(folder).name, digest_of(load(loader, folder)), flush=True)
