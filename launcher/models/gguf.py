"""Conversion of GGUF files (Llama family) to a folder of Transformers' format.

The folder has dequantized safetensors, config and tokenizer.

The weights go through ``gguf`` and numpy alone: no model is built, so it makes no difference whether the calling
process is about to partition models with ZeRO-3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.model.folder import SINGLE_FILE

if TYPE_CHECKING:
    import numpy as np
    from transformers import LlamaConfig

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of tensors, without layer and ``.weight``, to Transformers'."""


def convert_llama(source: Path, folder: Path, *, config: LlamaConfig, heartbeat: Callable[[], None]) -> None:
    """Write ``source`` into ``folder`` as fp32 safetensors with ``config`` and its tokenizer.

    Args:
        source: a GGUF file of the Llama architecture.
        folder: an existing, empty folder.
        config: sizes and rotary base of the model in ``source``.
        heartbeat: called after each tensor.
    """
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer

    tensors = {}
    for tensor in GGUFReader(source).tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            values = _rotary_halves(values, config.num_attention_heads)
        if ".attn_k." in tensor.name:
            values = _rotary_halves(values, config.num_key_value_heads)
        tensors[_name(tensor.name)] = np.ascontiguousarray(values, dtype=np.float32)
        heartbeat()
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _name(name: str) -> str:
    layer, stem = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()  # type: ignore[union-attr]
    prefix = f"model.layers.{layer}." if layer is not None else ""
    return f"{prefix}{_NAMES[stem]}.weight"


def _rotary_halves(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo GGUF's order of a head's rows.

    Rotary embeddings turn pairs of rows: neighbours in GGUF, row i and row i + head_dim/2 in Transformers.
    """
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
