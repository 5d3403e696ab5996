"""``decode_blocks.py FAMILY WEIGHTS``: decode plainly and by compiled blocks; tokens and number of compiled graphs."""

import json
import sys

import torch
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from launcher.benchmarks.decoding import CompiledBlocksDecoding, EagerDecoding
from launcher.config.quantization import METHODS
from launcher.quantization.convert import Converter

LENGTH, TOKENS = 32, 10
COMMON = {
    "vocab_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
}


def make(family: str) -> torch.nn.Module:
    """Return a model of four blocks."""
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=64, n_positions=LENGTH, **COMMON))
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=128, **COMMON))


family, weights = sys.argv[1:]
model = make(family).eval().requires_grad_(False)
if weights in METHODS:
    converter = Converter(model, METHODS[weights](), option="quantization")
    for name in converter.names:
        converter.convert(name)
ids = torch.arange(8).view(1, 8) * 7 + 11
ways = {"eager": EagerDecoding, "blocks": CompiledBlocksDecoding}
chosen = {
    name: way(model, batch=1, length=LENGTH).decode(ids, TOKENS, lambda: None)["chosen"] for name, way in ways.items()
}
print(json.dumps({**chosen, "graphs": counters["stats"]["unique_graphs"]}))
