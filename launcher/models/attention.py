"""Attention implementations as the models of Transformers find them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.config.attention import FlashAttention
from launcher.config.model.transformers_support import AttentionSupport
from launcher.config.supported_models import unsupported_attention
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.config.attention import Attention


def class_attention_support(family: type[PreTrainedModel]) -> AttentionSupport:
    """Return the attention support of a model class."""
    return AttentionSupport(
        sdpa=family._supports_sdpa,  # noqa: SLF001
        flex_attn=family._supports_flex_attn,  # noqa: SLF001
        attention_backend=family._supports_attention_backend,  # noqa: SLF001
        is_stateful=family._is_stateful,  # noqa: SLF001
    )


def attention_implementation(family: type[PreTrainedModel], attention: Attention) -> str:
    """Return the name under which models of ``family`` find ``attention``.

    Raises:
        ConfigError: Transformers has no such attention for this family.
    """
    if (error := unsupported_attention(attention, family.__name__, class_attention_support(family))) is not None:
        raise error
    if isinstance(attention, FlashAttention):
        ALL_ATTENTION_FUNCTIONS.register(attention.implementation, flash_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(attention.implementation, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return attention.implementation


def flash_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """Compute attention as Transformers' ``sdpa`` does, with every kernel but flash ruled out.

    Args:
        module: the attention layer.
        query: (sequences, heads, tokens, head width).
        key: the same, with fewer heads where groups share them.
        value: like ``key``.
        attention_mask: (sequences, 1, tokens, keys), ``None`` where causality is all there is to mask.
        rest: what else the layer passes on (dropout, scaling).

    Raises:
        ConfigError: the flash kernel cannot do this.
    """
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            result: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
                module, query, key, value, attention_mask, **rest
            )
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        mask = "a mask (padding, or a window)" if attention_mask is not None else "no mask"
        dropout = f"dropout {rest.get('dropout', 0.0):g}"
        why = (
            f"torch's flash kernel does not support {query.dtype} heads of {query.shape[-1]} with {mask} and {dropout}"
        )
        where = f"on {query.device.type}"
        raise ConfigError("attention", FlashAttention.kind, why=f"{why} {where}", fix="set attention=sdpa") from error
    return result
