"""A model as a list of its parts, and as the layers of a pipeline.

Each layer takes what the one before returns: hidden states alone. Masks and rotary angles, which blocks take
besides, are made on each rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from launcher.config.parallel.deepspeed_pipeline import unknown_family_error

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def units(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield a model's parts by name: embeddings, each block, norms, the output head.

    Containers of blocks, and models inside of the base model (of text, of images), are opened; everything else is a
    part as a whole.
    """
    base = model.base_model
    for name, child in model.named_children():
        if child is base:
            yield from _parts(base, f"{name}.")
        else:
            yield name, child
    if base is model:
        yield from _parts(model, "")


def _parts(base: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList):
            for key, block in child.named_children():
                yield f"{prefix}{name}.{key}", block
        elif isinstance(child, PreTrainedModel):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def inner_models(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the base model and the models inside of it, which :func:`units` opens, by name."""
    base = model.base_model
    prefix = "" if base is model else model.base_model_prefix
    pending = [(prefix, base)]
    while pending:
        name, opened = pending.pop(0)
        yield name, opened
        dot = f"{name}." if name else ""
        children = ((f"{dot}{key}", child) for key, child in opened.named_children())
        pending += [(key, child) for key, child in children if isinstance(child, PreTrainedModel)]


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks in order: the longest list of modules in the base model.

    Of a model that takes images, those of its text model.
    """
    base: nn.Module = model.base_model
    named = (getattr(base, name, None) for name in _TEXT_MODELS)
    base = next((inner for inner in named if isinstance(inner, PreTrainedModel)), base)
    lists = [child for child in base.children() if isinstance(child, nn.ModuleList)]
    return max(map(list, lists), key=len, default=[])


_TEXT_MODELS = ("language_model", "text_model")
"""Names that base models of image-text models have for their text model."""


@dataclass(frozen=True, kw_only=True)
class PipelineLayer:
    """One layer of a chain."""

    layer: nn.Module
    """Takes the token ids where it is the first, else hidden states (sequences, tokens, width)."""
    parts: tuple[str, ...]
    """Names of the model's parts that must be filled before it is called."""
    is_tied: bool = False
    """Whether its ``weight`` is another link's too."""
    call: Callable[[nn.Module, Tensor], Tensor] | None = None
    """How to apply the layer, if not by calling it."""


class PassPositions:
    """Positions of the tokens of each micro-batch that a stage is about to pass."""

    def __init__(self) -> None:
        self._coming: list[Tensor | None] = []
        self.current: Tensor | None = None
        """int64, shape (sequences, tokens), 0 where a document begins; ``None``: one a row."""
        self.number = 0
        """Of the micro-batch; no two have the same."""

    def begin(self, positions: Sequence[Tensor | None]) -> None:
        """Expect micro-batches at these positions."""
        self._coming = list(positions)

    def advance(self) -> None:
        """Go on to the next micro-batch."""
        self.current = self._coming.pop(0)
        self.number += 1

    def of(self, hidden: Tensor) -> Tensor:
        """Return the positions of hidden states (sequences, tokens, width).

        Returns:
            int64 of shape (sequences or 1, tokens).
        """
        if self.current is not None:
            return self.current
        return torch.arange(hidden.shape[1], device=hidden.device)[None]


class PipelineBlock(nn.Module):  # type: ignore[misc]
    """A block of the model with its inputs besides hidden states."""

    def __init__(self, block: nn.Module, besides: BlockInputs) -> None:
        super().__init__()
        self.block = block
        self._besides = besides

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the next hidden states, of the same shape."""
        answer = self.block(hidden, **self._besides.of(hidden))
        return answer[0] if isinstance(answer, tuple) else answer


class LearnedPositions(nn.Module):  # type: ignore[misc]
    """GPT-2's learned positions, added to the embedded tokens."""

    def __init__(self, embedding: nn.Module, dropout: nn.Module, positions: PassPositions) -> None:
        super().__init__()
        self.embedding, self.dropout, self._positions = embedding, dropout, positions

    def forward(self, embedded: Tensor) -> Tensor:
        """Return hidden states, of the same shape."""
        return self.dropout(embedded + self.embedding(self._positions.of(embedded)))


class BlockInputs:
    """Masks and rotary angles, computed once for each shape, or each packed micro-batch.

    It is not a module: angles stay fp32 whatever the layers are in.

    Args:
        config: of the model; its attention kernel decides about the mask.
        positions: of the micro-batch that passes.
        rotary: makes angles; ``None`` where the model has none.
    """

    def __init__(self, config: PreTrainedConfig, positions: PassPositions, *, rotary: nn.Module | None = None) -> None:
        self._config, self._positions, self._rotary = config, positions, rotary
        self._shape: Any = None
        self._made: dict[str, Any] = {}

    def of(self, hidden: Tensor) -> dict[str, Any]:
        """Return the arguments that blocks take besides ``hidden``."""
        packed = None if self._positions.current is None else self._positions.number
        shape = (hidden.shape, hidden.dtype, hidden.device, packed)
        if shape != self._shape:
            with torch.no_grad():
                self._shape, self._made = shape, self._make(hidden.detach())
        return self._made

    def _make(self, hidden: Tensor) -> dict[str, Any]:
        positions = self._positions.of(hidden)
        made = {"attention_mask": causal_mask(self._config, hidden, positions)}
        if self._rotary is not None:
            made["position_embeddings"] = self._rotary.to(hidden.device)(hidden, position_ids=positions)
        return made


def causal_mask(config: PreTrainedConfig, hidden: Tensor, positions: Tensor) -> Any:
    """Return the kernel's mask for rows of one or several whole documents.

    Transformers has renamed its arguments between versions.

    Args:
        config: of the model.
        hidden: (sequences, tokens, width); its device and format are the mask's.
        positions: int64 (sequences or 1, tokens), restarting at 0 where a document begins.
    """
    offered = {
        "config": config,
        "attention_mask": None,
        "position_ids": positions,
        "cache_position": positions[0],
        **dict.fromkeys(("inputs_embeds", "input_embeds"), hidden),
        **dict.fromkeys(("cache", "past_key_values")),
    }
    taken = inspect.signature(create_causal_mask).parameters
    return create_causal_mask(**{name: value for name, value in offered.items() if name in taken})


def pipeline_layers(model: PreTrainedModel, positions: PassPositions) -> list[PipelineLayer]:
    """Return the layers of a model in order, from token ids to logits.

    Args:
        model: to cut.
        positions: of the tokens that will pass.

    Raises:
        ConfigError: of a family that is not known to work this way.
    """
    family = model.config.model_type
    if family not in _LAYERS_BY_FAMILY:
        raise unknown_family_error(family)
    names = {id(part): name for name, part in units(model)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    return [
        PipelineLayer(layer=embedding, parts=(names[id(embedding)],), is_tied=is_tied),
        *_LAYERS_BY_FAMILY[family](model, names, positions),
        # a tied head is the embedding once more: a rank that has no other use for it holds its weight alone
        PipelineLayer(layer=embedding, parts=(names[id(embedding)],), is_tied=True, call=_project)
        if is_tied
        else PipelineLayer(layer=head, parts=(names[id(head)],)),
    ]


def _project(embedding: nn.Module, hidden: Tensor) -> Tensor:
    return linear(hidden, embedding.get_parameter("weight"))


def _gpt2_layers(model: PreTrainedModel, names: dict[int, str], positions: PassPositions) -> list[PipelineLayer]:
    base, besides = model.base_model, BlockInputs(model.config, positions)
    learned = PipelineLayer(
        layer=LearnedPositions(base.wpe, base.drop, positions), parts=(names[id(base.wpe)], names[id(base.drop)])
    )
    middle = [PipelineLayer(layer=PipelineBlock(block, besides), parts=(names[id(block)],)) for block in blocks(model)]
    return [learned, *middle, PipelineLayer(layer=base.ln_f, parts=(names[id(base.ln_f)],))]


def _llama_layers(model: PreTrainedModel, names: dict[int, str], positions: PassPositions) -> list[PipelineLayer]:
    base, rotary = model.base_model, model.base_model.rotary_emb
    besides = BlockInputs(model.config, positions, rotary=rotary)
    middle = [
        PipelineLayer(layer=PipelineBlock(block, besides), parts=(names[id(rotary)], names[id(block)]))
        for block in blocks(model)
    ]
    return [*middle, PipelineLayer(layer=base.norm, parts=(names[id(base.norm)],))]


_LAYERS_BY_FAMILY: dict[str, Callable[[PreTrainedModel, dict[int, str], PassPositions], list[PipelineLayer]]] = {
    "gpt2": _gpt2_layers,
    "llama": _llama_layers,
}
"""Layers between embedding and head, by family."""
