"""Adapters as PEFT saves them, and the models that PEFT makes of them: what the engine must equal."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

LLAMA: Mapping[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "mlp": {"r": 3, "lora_alpha": 8, "use_rslora": True, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "all": {
        "r": 2,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.*": 1},
        "alpha_pattern": {"k_proj": 3},
    },
    "one": {"r": 40, "target_modules": ["k_proj"], "layers_to_transform": [1]},
}
GPT2: Mapping[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "all": {"r": 5, "use_rslora": True, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
}
ADAPTERS = {"llama": LLAMA, "gpt2": GPT2}


def save_adapter(model: PreTrainedModel, folder: Path, *, seed: int, **settings: Any) -> PreTrainedModel:
    """Save an adapter with random values into ``folder``; return a copy of the model that has it, of PEFT's make."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that PEFT imports
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        adapted = get_peft_model(copy.deepcopy(model), config).eval()
        adapted.save_pretrained(folder)
    return adapted.requires_grad_(False)
