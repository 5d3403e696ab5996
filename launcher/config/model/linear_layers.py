"""Names and sizes of the layers that adapters are trained on, from a model's sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from launcher.config.model.shape import Gpt2Sizes, LlamaSizes

if TYPE_CHECKING:
    from launcher.config.model.base import Model


@dataclass(frozen=True, kw_only=True)
class LinearSize:
    """One linear layer in a block of a model."""

    inputs: int
    outputs: int
    has_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class ModuleSizes:
    """What a model consists of, by the names that Transformers gives the modules."""

    linear: Mapping[str, LinearSize]
    """Linear layers in the blocks."""
    others: Mapping[str, int]
    """Embeddings, norms and output head, with their numbers of parameters."""
    num_biases: int
    """Elements of all biases."""
    tied: frozenset[str]
    """Those of ``others`` that share their weight with each other."""
    biased: frozenset[str] = frozenset()
    """Those of ``others`` that have a bias too."""

    def parameters_of(self, module: str) -> list[str]:
        """Return the names, within a module, of its parameters."""
        size = self.linear.get(module)
        has_bias = module in self.biased if size is None else size.has_bias
        return ["weight", "bias"] if has_bias else ["weight"]

    @property
    def parameter_names(self) -> list[str]:
        """Names of the model's parameters; shared ones have the embedding's."""
        shared = {"lm_head"} & self.tied
        modules = [name for name in (*self.others, *self.linear) if name not in shared]
        return [f"{name}.{leaf}" for name in modules for leaf in self.parameters_of(name)]


def module_sizes(model: Model) -> ModuleSizes | None:
    """Return the modules of a model; ``None`` for families whose sizes are not known exactly."""
    sizes = _sizes_of(model.architecture())
    return None if sizes is None else modules_of(sizes)


def modules_of(sizes: Gpt2Sizes | LlamaSizes) -> ModuleSizes:
    """Return the modules of a model of these sizes."""
    return _gpt2_modules(sizes) if isinstance(sizes, Gpt2Sizes) else _llama_modules(sizes)


def _sizes_of(architecture: Mapping[str, Any]) -> Gpt2Sizes | LlamaSizes | None:
    if architecture.get("family") == "gpt2" and architecture.keys() == {*_names(Gpt2Sizes), "family"}:
        return Gpt2Sizes(**{name: architecture[name] for name in _names(Gpt2Sizes)})
    return LlamaSizes(**architecture) if architecture.keys() == _names(LlamaSizes) else None


def _names(sizes: type[Gpt2Sizes | LlamaSizes]) -> set[str]:
    return {field.name for field in fields(sizes)}


def _gpt2_modules(sizes: Gpt2Sizes) -> ModuleSizes:
    width, count = sizes.hidden_size, sizes.num_hidden_layers
    block = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    linear = {
        f"transformer.h.{number}.{name}": LinearSize(inputs=inputs, outputs=outputs, has_bias=True)
        for number in range(count)
        for name, (inputs, outputs) in block.items()
    }
    norms = {f"transformer.h.{number}.{name}": 2 * width for number in range(count) for name in ("ln_1", "ln_2")}
    embedding = sizes.vocab_size * width
    ends = {"wte": embedding, "wpe": sizes.max_position_embeddings * width, "ln_f": 2 * width}
    return ModuleSizes(
        linear=linear,
        others={**{f"transformer.{name}": size for name, size in ends.items()}, **norms, "lm_head": embedding},
        num_biases=count * 11 * width + width,
        tied=frozenset({"transformer.wte", "lm_head"}),
        biased=frozenset({"transformer.ln_f", *norms}),
    )


def _llama_modules(sizes: LlamaSizes) -> ModuleSizes:
    linear = {
        f"model.layers.{number}.{name}": size
        for number in range(sizes.num_hidden_layers)
        for name, size in _llama_block(sizes)
    }
    norms = {
        f"model.layers.{number}.{name}": sizes.hidden_size
        for number in range(sizes.num_hidden_layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    if sizes.qk_norm:
        norms |= {
            f"model.layers.{number}.self_attn.{name}": sizes.head_dim
            for number in range(sizes.num_hidden_layers)
            for name in ("q_norm", "k_norm")
        }
    embedding = sizes.vocab_size * sizes.hidden_size
    return ModuleSizes(
        linear=linear,
        others={"model.embed_tokens": embedding, "model.norm": sizes.hidden_size, **norms, "lm_head": embedding},
        num_biases=sum(size.outputs for size in linear.values() if size.has_bias),
        tied=frozenset({"model.embed_tokens", "lm_head"} if sizes.tie_word_embeddings else ()),
    )


def _llama_block(sizes: LlamaSizes) -> Iterator[tuple[str, LinearSize]]:
    width, inner = sizes.hidden_size, sizes.intermediate_size
    queries, keys = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"self_attn.{name}", LinearSize(inputs=width, outputs=outputs, has_bias=sizes.qkv_bias)
    yield "self_attn.o_proj", LinearSize(inputs=queries, outputs=width, has_bias=sizes.output_bias)
    for name in ("gate_proj", "up_proj"):
        yield f"mlp.{name}", LinearSize(inputs=width, outputs=inner, has_bias=sizes.mlp_bias)
    yield "mlp.down_proj", LinearSize(inputs=inner, outputs=width, has_bias=sizes.mlp_bias)
