"""Keys and values in pages, behind Transformers' ``Cache``, and attention over them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.serving.kernels.table import Table
from launcher.serving.pages import PAGE
from launcher.serving.places import Places, gathered

if TYPE_CHECKING:
    from torch import Tensor, nn

    from launcher.serving.kernels.attention import NativeAttention
    from launcher.serving.kernels.library import Tokens
    from launcher.serving.plan import StepPlan
    from launcher.serving.shapes import Shapes

ATTENTION = "launcher_pages"
"""The name under which models find the attention of this module; one that has no mask made for it."""


class PagedCache(Cache):  # type: ignore[misc]
    """Keys and values of all sequences, a tensor of each by number of layer: (tokens of all pages, heads, width).

    Compiled kernels order numbers within a page in their own way.

    Args:
        shapes: of what each layer keeps of a token.
        num_pages: besides one that takes what is computed for no sequence.
        dtype: of keys and values.
        device: where they are.
    """

    def __init__(self, shapes: Shapes, *, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        size = (num_pages + 1) * PAGE

        def room(sizes: tuple[tuple[int, int], ...]) -> dict[int, Tensor]:
            numbered = enumerate(sizes, shapes.first_layer)
            return {layer: torch.zeros((size, *shape), dtype=dtype, device=device) for layer, shape in numbered}

        self.keys, self.values = room(shapes.keys), room(shapes.values)
        self.scratch = num_pages
        self.step: Step | None = None
        self.kernels: NativeAttention | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write those of this step; (1, heads, tokens, width) each."""
        assert self.step is not None
        if self.kernels is not None:  # they write themselves
            return key_states, value_states
        self.keys[layer_idx].index_copy_(0, self.step.slots, key_states[0].transpose(0, 1))
        self.values[layer_idx].index_copy_(0, self.step.slots, value_states[0].transpose(0, 1))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given with every step."""
        return 0

    def copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy pages: to, from."""
        for target, source in pairs:
            for arena in (*self.keys.values(), *self.values.values()):
                arena[target * PAGE : (target + 1) * PAGE] = arena[source * PAGE : (source + 1) * PAGE]


class Step:
    """Where the tokens of one step are, as tensors.

    Args:
        plan: of the step.
        cache: that it goes to.
        device: of the model.
    """

    def __init__(self, plan: StepPlan, cache: PagedCache, *, device: torch.device) -> None:
        self.cache, self._plan, self._device = cache, plan, device
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        slots: list[int] = []
        for part in plan.segments:
            span = range(part.start, part.start + len(part.tokens))
            tokens += part.tokens
            positions += span
            slots += [part.pages[at // PAGE] * PAGE + at % PAGE for at in span]
            if part.wanted:
                wanted.append(len(tokens) - 1)
        for numbers, filler in ((tokens, 0), (positions, 0), (slots, cache.scratch * PAGE)):
            numbers += [filler] * plan.padding
        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.slots = torch.tensor(slots, device=device)
        self.wanted = torch.tensor(wanted, dtype=torch.long, device=device)

    @cached_property
    def _places(self) -> Places:
        return Places(self._plan, device=self._device)

    @cached_property
    def _table(self) -> Table:
        return Table(self._plan, slots=self.slots)

    def native(self, rotary: tuple[Tensor, Tensor] | None = None) -> Tokens:
        """Return the step as compiled kernels take it.

        Args:
            rotary: cosines and sines, (1, tokens, width) each, of the model's format.
        """
        return self._table.with_rotary(rotary)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        """Return attention of each token over its own sequence, (1, tokens, heads, width).

        Args:
            layer: which.
            query: (1, heads, tokens, width).
            key: of this step, likewise.
            value: likewise.
            scale: of scores.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.cache.kernels is not None:
            return self.cache.kernels.attend(self.native(), (query, key, value), (keys, values), scale=scale)
        return gathered(self._places, query, keys, values, scale=scale)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    launcher_step: Step,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Compute attention as Transformers' ``sdpa`` does, over pages.

    Args:
        module: the attention layer.
        query: (1, heads, tokens of all sequences, head width).
        key: of this step alone.
        value: like ``key``.
        attention_mask: none is made for this kernel.
        scaling: of scores.
        launcher_step: where the tokens are.
        rest: what the layer says besides.

    Raises:
        NotImplementedError: the layer asks for more than plain causal attention.
    """
    strange = [name for name in ("softcap", "s_aux", "position_bias", "sliding_window") if rest.get(name) is not None]
    if strange or attention_mask is not None:
        raise NotImplementedError(f"attention with {', '.join(strange) or 'a mask of its own'}")
    return launcher_step.attend(module.layer_idx, query, key, value, scale=scaling), None


def register() -> None:
    """Tell Transformers of this attention."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
