"""GGUF files of Llama and GPT-2: names, order of rows, conversion to a model folder.

The weights go through ``gguf`` and numpy alone: no model is built, so it makes no difference whether the calling
process is about to partition models with ZeRO-3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.model.folder import SINGLE_FILE
from launcher.errors import EXIT_BAD_INPUT, JobError
from launcher.models.gguf_tokenizer import GgufTokenizer, tokenizer_json, write_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedConfig

LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
"""GGUF's names of tensors, without layer and ``.weight``, to Transformers'."""

GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}
"""The same for GPT-2."""

NAMES = {"llama": LLAMA_NAMES, "gpt2": GPT2_NAMES}
"""Names of each architecture, which GGUF calls as Transformers does."""

PER_LAYER = frozenset(stem for names in NAMES.values() for stem, name in names.items() if "{}" in name)
"""GGUF's names of tensors that each layer has."""

ROPE_FACTORS = "rope_freqs.weight"
"""By what the wavelengths of rotary positions are multiplied, where they are scaled."""

TRANSPOSED = frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"})
"""Of GPT-2, the matrices that Transformers keeps as (inputs, outputs)."""

SPECIAL_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
"""Keys of special tokens by their names in tokenizer_config.json."""


def convert_llama(source: Path, folder: Path, *, config: LlamaConfig, heartbeat: Callable[[], None]) -> None:
    """Write ``source`` into ``folder`` as fp32 safetensors with ``config`` and its tokenizer.

    Args:
        source: a GGUF file of the Llama architecture.
        folder: an existing, empty folder.
        config: sizes and rotary base of the model in ``source``.
        heartbeat: called after each tensor.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    _write_folder(GGUFReader(source), folder, config=config, heartbeat=heartbeat)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def convert_gguf(source: Path, folder: Path, *, heartbeat: Callable[[], None] = lambda: None) -> None:
    """Write a file of any program into ``folder``: fp32 safetensors, config and tokenizer.

    Args:
        source: a GGUF file of Llama or GPT-2.
        folder: an existing, empty folder.
        heartbeat: called after each tensor.

    Raises:
        JobError: it is damaged, or holds what Transformers would not read the same way; the message names it.
    """
    from gguf import GGUFReader
    from huggingface_hub.errors import StrictDataclassError

    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise JobError(f"{source} is no intact GGUF file: {error}", exit_code=EXIT_BAD_INPUT) from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in NAMES:
        known = ", ".join(NAMES)
        raise JobError(f"{source} is of the architecture {architecture}; known are {known}", exit_code=EXIT_BAD_INPUT)
    shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    try:
        config = _llama_config(fields, shapes) if architecture == "llama" else _gpt2_config(fields, shapes)
        _check_tensors(shapes, _expected(config), layers=config.num_hidden_layers)
        tokenizer = _tokenizer(fields)
        _write_folder(reader, folder, config=config, heartbeat=heartbeat)
    except KeyError as error:
        raise JobError(f"{source} lacks {error}", exit_code=EXIT_BAD_INPUT) from error
    except StrictDataclassError as error:  # Transformers refuses what no model can be
        why = str(error).strip().splitlines()[-1].strip()
        raise JobError(f"{source} describes no model: {why}", exit_code=EXIT_BAD_INPUT) from error
    except JobError as error:
        raise JobError(f"{source}: {error}", exit_code=EXIT_BAD_INPUT) from error
    write_tokenizer(tokenizer, folder)


def _write_folder(reader: GGUFReader, folder: Path, *, config: PreTrainedConfig, heartbeat: Callable[[], None]) -> None:
    import numpy as np
    from gguf import dequantize
    from safetensors.numpy import save_file

    tensors = {}
    for tensor in reader.tensors:
        stem, name = _name(tensor.name, NAMES[config.model_type])
        values = dequantize(tensor.data, tensor.tensor_type)
        if config.model_type == "gpt2" and stem in TRANSPOSED and values.ndim == 2:
            values = values.T
        elif config.model_type == "llama" and stem == "attn_q":
            values = _rotary_halves(values, config.num_attention_heads)
        elif config.model_type == "llama" and stem == "attn_k":
            values = _rotary_halves(values, config.num_key_value_heads)
        tensors[name] = np.ascontiguousarray(values, dtype=np.float32)
        heartbeat()
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM" if config.model_type == "llama" else "GPT2LMHeadModel"]
    config.save_pretrained(folder)


def _name(name: str, names: dict[str, str]) -> tuple[str, str]:
    """Return a tensor's name in GGUF without layer, and Transformers' name."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None or found[2] not in names:
        raise JobError(f"it has a tensor {name}, which the model in Transformers has not", exit_code=EXIT_BAD_INPUT)
    return found[2], f"{names[found[2]].format(found[1])}.{found[3]}"


def _count(fields: dict[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive number of the header, one for all layers."""
    found = fields[key] if default is None else fields.get(key, default)
    if type(found) is not int or found < 1:
        raise JobError(f"its {key} is {found!r}, and must be one number of at least 1", exit_code=EXIT_BAD_INPUT)
    return found


def _even(head_size: int) -> int:
    if head_size % 2:
        raise JobError(f"its heads are {head_size} wide, which rotary pairs do not divide", exit_code=EXIT_BAD_INPUT)
    return head_size


def _expected(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a header describes, by names without layer (``attn_q``)."""
    width, inner, vocabulary = config.hidden_size, getattr(config, "intermediate_size", None), config.vocab_size
    if config.model_type == "gpt2":
        inner = config.n_inner
        return {
            "token_embd": (vocabulary, width),
            "position_embd": (config.n_positions, width),
            "output_norm": (width,),
            "attn_norm": (width,),
            "ffn_norm": (width,),
            "attn_qkv": (3 * width, width),
            "attn_output": (width, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        } | ({} if config.tie_word_embeddings else {"output": (vocabulary, width)})
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "token_embd": (vocabulary, width),
        "output_norm": (width,),
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    } | ({} if config.tie_word_embeddings else {"output": (vocabulary, width)})


def _check_tensors(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], *, layers: int) -> None:
    """Raise if the tensors of a file are not those that its header describes.

    Raises:
        JobError: one is missing, of another shape, or of a layer too many.
    """
    numbers = {int(found[1]) for name in shapes if (found := re.match(r"blk\.(\d+)\.", name))}
    if len(numbers) != layers or max(numbers) != layers - 1:
        why = f"its header says {layers} layers, and it has tensors of {len(numbers)}"
        raise JobError(f"{why}, up to number {max(numbers, default=-1)}", exit_code=EXIT_BAD_INPUT)
    for stem, shape in expected.items():
        prefixes = [f"blk.{number}." for number in range(layers)] if stem in PER_LAYER else [""]
        for name in (f"{prefix}{stem}.weight" for prefix in prefixes):
            if name not in shapes:
                raise JobError(f"it lacks the tensor {name}", exit_code=EXIT_BAD_INPUT)
            if shapes[name] != shape:
                why = f"its tensor {name} is {shapes[name]}, and its header describes {shape}"
                raise JobError(why, exit_code=EXIT_BAD_INPUT)


def _llama_config(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> PreTrainedConfig:
    """Return the configuration that the fields of a file describe.

    Raises:
        JobError: rotary positions are scaled.
    """
    from transformers import LlamaConfig

    scaling = fields.get("llama.rope.scaling.type", "none")
    if ROPE_FACTORS in shapes or scaling != "none":
        raise JobError("its rotary positions are scaled, which is not read back", exit_code=EXIT_BAD_INPUT)
    heads, width = _count(fields, "llama.attention.head_count"), _count(fields, "llama.embedding_length")
    return LlamaConfig(
        num_hidden_layers=_count(fields, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_count(fields, "llama.attention.head_count_kv", heads),
        head_dim=_even(_count(fields, "llama.attention.key_length", max(1, width // heads))),
        hidden_size=width,
        intermediate_size=_count(fields, "llama.feed_forward_length"),
        vocab_size=shapes["token_embd.weight"][0],
        max_position_embeddings=_count(fields, "llama.context_length"),
        tie_word_embeddings="output.weight" not in shapes,
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("llama.rope.freq_base", 10_000.0)},
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        **_special_ids(fields),
    )


def _gpt2_config(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> PreTrainedConfig:
    from transformers import GPT2Config

    return GPT2Config(
        n_layer=_count(fields, "gpt2.block_count"),
        n_head=_count(fields, "gpt2.attention.head_count"),
        n_embd=_count(fields, "gpt2.embedding_length"),
        n_inner=_count(fields, "gpt2.feed_forward_length"),
        n_positions=_count(fields, "gpt2.context_length"),
        vocab_size=shapes["token_embd.weight"][0],
        layer_norm_epsilon=fields["gpt2.attention.layer_norm_epsilon"],
        tie_word_embeddings="output.weight" not in shapes,
        **_special_ids(fields),
    )


def _special_ids(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_id": fields.get(SPECIAL_KEYS[name]) for name in ("bos_token", "eos_token", "pad_token")}


def _tokenizer(fields: dict[str, Any]) -> GgufTokenizer:
    """Return the tokenizer of a file: its ``tokenizer.json``, or what its lists say.

    Raises:
        JobError: it is none that is known.
    """
    kind = fields["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise JobError(f"its tokenizer is {kind}, not byte-level BPE (gpt2)", exit_code=EXIT_BAD_INPUT)
    special = {name: fields[key] for name, key in SPECIAL_KEYS.items() if key in fields}
    adds_bos = bool(fields.get("tokenizer.ggml.add_bos_token", False))
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges, rule = fields["tokenizer.ggml.merges"], fields.get("tokenizer.ggml.pre", "default")
    text = fields.get("tokenizer.huggingface.json")
    if text is None:
        bos = special.get("bos_token") if adds_bos else None
        text = tokenizer_json(tokens=tokens, kinds=kinds, merges=merges, rule=rule, bos=bos)
    return GgufTokenizer(
        tokens=tokens,
        kinds=kinds,
        merges=merges,
        rule=rule,
        special=special,
        add_bos=adds_bos,
        chat_template=fields.get("tokenizer.chat_template"),
        json=text,
    )


def _rotary_halves(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo GGUF's order of a head's rows.

    Rotary embeddings turn pairs of rows: neighbours in GGUF, row i and row i + head_dim/2 in Transformers.
    """
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def rotary_neighbours(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Return a head's rows in GGUF's order: the inverse of what a conversion does.

    Args:
        values: (rows, columns) of queries or keys, in Transformers' order.
        num_heads: which have the rows.
    """
    rows, columns = values.shape
    halves = values.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
