"""Options of the verb ``export``."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)B", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SHARD_SIZE = "5GB"
SAFETENSORS, GGUF, ONNX, OPENVINO = "safetensors", "gguf", "onnx", "openvino"


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """What a format can hold, and what writes it."""

    dtypes: tuple[str, ...]
    """Values of ``dtype``, the default first."""
    families: tuple[str, ...] = ()
    """``model_type`` of the models that the exporter knows; empty for all of Transformers."""
    packages: tuple[str, ...] = ()
    """Modules that write it; the extra of the format's name installs them."""
    rope_types: tuple[str, ...] = ("default",)
    """Kinds of rotary positions that it writes."""
    exact: tuple[str, ...] = ()
    """Values of ``dtype`` in which its runtime must choose the same tokens."""


FORMATS: dict[str, ExportFormat] = {
    SAFETENSORS: ExportFormat(dtypes=("fp32", "bf16", "fp16")),
    GGUF: ExportFormat(
        dtypes=("fp16", "fp32", "bf16", "q8_0", "q4_0", "q4_1", "q4_k"),
        families=("gpt2", "llama"),
        rope_types=("default", "linear", "llama3"),
        exact=("fp32", "bf16", "fp16"),
    ),
    ONNX: ExportFormat(
        dtypes=("fp32", "int8", "int4"),
        families=("llama",),
        packages=("onnxruntime_genai", "onnx_ir", "onnx"),
        exact=("fp32",),
    ),
    OPENVINO: ExportFormat(
        dtypes=("fp16", "int8", "int4"),
        families=("llama",),
        packages=("openvino_genai", "openvino_tokenizers", "openvino"),
        exact=("fp16",),
    ),
}
"""Formats by name."""

DTYPE_DEFAULT = "auto"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a checkpoint is written for other programs."""

    format: Literal["safetensors", "gguf", "onnx", "openvino"] = "safetensors"
    """``safetensors``: a folder that Transformers, vLLM and others load; ``gguf``: one file.
    llama.cpp and the programs around it load that file. ``onnx`` and ``openvino`` are folders that ONNX Runtime GenAI
    and OpenVINO GenAI load."""

    dtype: Literal["auto", "fp32", "bf16", "fp16", "q8_0", "q4_0", "q4_1", "q4_k", "int8", "int4"] = "auto"
    """Format of the weights; ``auto`` is fp32, and fp16 for ``gguf`` and ``openvino``.
    A checkpoint holds them in fp32; bf16 and fp16 take half of it. ``q8_0``, ``q4_0``, ``q4_1`` and ``q4_k`` are
    llama.cpp's, of 8.5, 4.5, 5 and 4.5 bits, for ``gguf`` only. ``int8`` and ``int4`` are for ``onnx`` and
    ``openvino``."""

    max_shard_size: str = _SHARD_SIZE
    """Bytes of one file at most, as ``500MB`` or ``5GB``; a tensor is never split.
    Of ``safetensors`` only."""

    merge: bool = False
    """Of a run with an adapter: add it to the model's weights, and write the whole model.
    Otherwise the folder holds the adapter alone, as PEFT writes it."""

    check: bool = True
    """Run the file by its own runtime, if that is installed, and compare the answers.
    Not of ``safetensors``."""

    @property
    def max_shard_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        found = _SIZE.fullmatch(self.max_shard_size)
        return int(float(found[1]) * _FACTORS[found[2].upper()]) if found else 0

    @property
    def about(self) -> ExportFormat:
        """What the format can hold."""
        return FORMATS[self.format]

    @property
    def chosen_dtype(self) -> str:
        """``dtype``, with the format's default for ``auto``."""
        return self.about.dtypes[0] if self.dtype == DTYPE_DEFAULT else self.dtype

    def validate(self) -> Iterator[ConfigError]:
        """Reject a size that is none, and options that the format does not have."""
        if self.max_shard_bytes < 1:
            fix = f"write max_shard_size={_SHARD_SIZE}"
            yield ConfigError("max_shard_size", self.max_shard_size, why="is not a size above 0", fix=fix)
        elif self.format != SAFETENSORS and self.max_shard_size != _SHARD_SIZE:
            why = f"format={self.format} has no such files"
            yield ConfigError("max_shard_size", self.max_shard_size, why=why, fix="leave it out")
        if self.chosen_dtype not in self.about.dtypes:
            why = f"format={self.format} holds no such weights"
            homes = [name for name, other in FORMATS.items() if self.dtype in other.dtypes]
            fix = f"write dtype={'|'.join(self.about.dtypes)}, or format={'|'.join(homes)}"
            yield ConfigError("dtype", self.dtype, why=why, fix=fix)
        if self.format == SAFETENSORS and not self.check:
            yield ConfigError("check", "false", why="format=safetensors is not checked", fix="leave it out")

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield the packages that write the format and are missing."""
        missing = [name for name in self.about.packages if importlib.util.find_spec(name) is None]
        if missing:
            why = f"needs the package {missing[0].replace('_', '-')}, which is missing"
            yield ConfigError("format", self.format, why=why, fix=f"pip install 'launcher[{self.format}]'")

    def validate_model(self, config: Mapping[str, Any]) -> Iterator[ConfigError]:
        """Yield why a model cannot be written in the format, judged by its ``config.json``."""
        families = self.about.families
        if not families:
            return
        family, known = config.get("model_type"), ", ".join(families)
        if any(key in config for key in ("vision_config", "audio_config")):
            why = f"{family} is a model of more than text, which the exporter does not write"
            yield ConfigError("format", self.format, why=why, fix=f"export a text model ({known}), or safetensors")
        elif family not in families:
            why = (
                f"the exporter has no architecture {family}, only {known}"
                if family
                else "config.json has no model_type"
            )
            yield ConfigError("format", self.format, why=why, fix="write format=safetensors")
        else:
            yield from self._validate_parts(config)

    def _validate_parts(self, config: Mapping[str, Any]) -> Iterator[ConfigError]:
        for part in _unknown_parts(config, self.about.rope_types):
            why = f"the exporter does not write {config['model_type']} with {part}"
            yield ConfigError("format", self.format, why=why, fix="write format=safetensors")


def _unknown_parts(config: Mapping[str, Any], rope_types: Sequence[str]) -> Sequence[str]:
    """Return what a model of a known family has and the exporter does not write."""
    if config["model_type"] == "gpt2":
        activation = config.get("activation_function", "gelu_new")
        unknown = [f"activation_function={activation}"] if activation != "gelu_new" else []
        scales = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
        return unknown + [f"{key}={config[key]}" for key, usual in scales.items() if config.get(key, usual) != usual]
    found = [f"{key}=true" for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if (activation := config.get("hidden_act", "silu")) != "silu":
        found.append(f"hidden_act={activation}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return found + ([f"rotary positions of type {kind}"] if kind not in rope_types else [])
