"""Write a model as one GGUF file, which llama.cpp and the programs around it load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from launcher.models.gguf import NAMES, ROPE_FACTORS, SPECIAL_KEYS, TRANSPOSED, rotary_neighbours
from launcher.models.gguf_tokenizer import GgufTokenizer, read_tokenizer
from launcher.quantization.ggml import quantized, stored_type

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

    from launcher.models.export import ModelExport

_FILE_TYPES = {
    "fp32": "ALL_F32",
    "fp16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_k": "MOSTLY_Q4_K_S",
}


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    is_transposed: bool = False
    """Whether Transformers has it as (inputs, outputs)."""

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of its bytes: rows, and the bytes of a row."""
        from gguf import quant_shape_to_byte_shape

        found: tuple[int, ...] = quant_shape_to_byte_shape(self.shape, self.kind)
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return int(np.prod(self.byte_shape))


class GgufExport:
    """One file of a checkpoint's weights, its sizes, tokenizer and chat template.

    Args:
        export: the tensors in fp32, and the folder of the tokenizer.
        dtype: of the weights, as ``q8_0``.

    Raises:
        JobError: llama.cpp has no such tokenizer.
    """

    def __init__(self, export: ModelExport, *, dtype: str) -> None:
        self._export, self._config, self._dtype = export, export.config, dtype
        self._stems = {name: stem for stem, name in NAMES[self._config.model_type].items()}
        self._tokenizer = read_tokenizer(export.source, num_rows=self._config.vocab_size)
        self._plan = [self._planned(entry.name, entry.shape) for entry in export.entries]
        self._factors = _rope_factors(self._config)
        self.num_bytes = sum(planned.num_bytes for planned in self._plan)
        self.num_params = export.num_params

    def _planned(self, name: str, shape: tuple[int, ...]) -> _Planned:
        stem, own = self._gguf_name(name)
        is_transposed = self._config.model_type == "gpt2" and stem in TRANSPOSED and len(shape) == 2
        if is_transposed:
            shape = shape[::-1]
        kind = stored_type(own, tuple(shape), self._dtype)
        return _Planned(name=own, shape=tuple(shape), kind=kind, is_transposed=is_transposed)

    def _gguf_name(self, name: str) -> tuple[str, str]:
        """Return a tensor's name in GGUF without layer, and its whole name."""
        path, _, ending = name.rpartition(".")
        parts = path.split(".")
        layer = next((part for part in parts if part.isdigit()), None)
        stem = self._stems[".".join("{}" if part == layer else part for part in parts)]
        return stem, f"{stem}.{ending}" if layer is None else f"blk.{layer}.{stem}.{ending}"

    def kinds(self) -> str:
        """Return how many tensors have each format, as ``61 in f32, 211 in q8_0``."""
        counted = Counter(planned.kind.name.lower() for planned in self._plan)
        return ", ".join(f"{count} in {kind}" for kind, count in sorted(counted.items()))

    def write(self, file: Path, *, written: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Write a file; one tensor is in memory at a time.

        Args:
            file: replaced if it exists.
            written: called with the bytes of weights written since its last call.

        Raises:
            OSError: the disk is full.
        """
        from gguf import GGUFWriter

        writer = GGUFWriter(file, self._config.model_type)
        try:
            self._add_fields(writer)
            for planned in self._all_planned():
                writer.add_tensor_info(
                    planned.name, planned.byte_shape, np.dtype(np.uint8), planned.num_bytes, raw_dtype=planned.kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if self._factors is not None:
                writer.write_tensor_data(self._factors.view(np.uint8))
            for planned, tensor in zip(self._plan, self._export.values(), strict=True):
                writer.write_tensor_data(self._bytes_of(planned, tensor))
                written(planned.num_bytes)
            writer.flush()
        finally:
            writer.close()

    def _all_planned(self) -> Iterator[_Planned]:
        if self._factors is not None:
            shape = self._factors.shape
            yield _Planned(name=ROPE_FACTORS, shape=shape, kind=stored_type(ROPE_FACTORS, shape, self._dtype))
        yield from self._plan

    def _bytes_of(self, planned: _Planned, tensor: Tensor) -> np.ndarray:
        values = tensor.to(torch.float32).numpy()
        if planned.is_transposed:
            values = values.T
        elif ".attn_q." in planned.name:
            values = rotary_neighbours(values, self._config.num_attention_heads)
        elif ".attn_k." in planned.name:
            values = rotary_neighbours(values, self._config.num_key_value_heads)
        found: np.ndarray = np.ascontiguousarray(quantized(np.ascontiguousarray(values), planned.kind)).view(np.uint8)
        return found

    def _add_fields(self, writer: GGUFWriter) -> None:
        from gguf import GGUFValueType, LlamaFileType

        writer.add_type("model")
        writer.add_name(self._config.model_type)
        writer.add_quantization_version(2)
        writer.add_file_type(LlamaFileType[_FILE_TYPES[self._dtype]])
        sizes = _llama_sizes if self._config.model_type == "llama" else _gpt2_sizes
        for key, value in sizes(self._config).items():
            kind = GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.UINT32
            writer.add_key_value(f"{self._config.model_type}.{key}", value, kind)
        _add_tokenizer(writer, self._tokenizer)


def _llama_sizes(config: Any) -> dict[str, float | int]:
    rope = config.rope_parameters
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _gpt2_sizes(config: Any) -> dict[str, float | int]:
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _rope_factors(config: Any) -> np.ndarray | None:
    """Return by what each wavelength is multiplied, where rotary positions are scaled."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    found: np.ndarray = (plain / scaled.double()).float().numpy()
    return found


def _add_tokenizer(writer: GGUFWriter, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.rule)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.kinds)
    writer.add_token_merges(tokenizer.merges)
    for name, number in tokenizer.special.items():
        writer.add_uint32(SPECIAL_KEYS[name], number)
    writer.add_add_bos_token(tokenizer.add_bos)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    writer.add_string("tokenizer.huggingface.json", tokenizer.json)
