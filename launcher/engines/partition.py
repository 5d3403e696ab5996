"""Building a model under ZeRO-3 so that no rank ever holds all of it.

``deepspeed.zero.Init`` around the construction of a Transformers model is silently wrong: Transformers initialises
parameters that are already empty. So each part of the model is partitioned once it has its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

if TYPE_CHECKING:
    from torch import nn


class Partitioning:
    """Partitions the parts of a model, and lets Transformers know of it until :meth:`forget`: generation asks.

    Args:
        config: DeepSpeed's, of stage 3.
        dtype: of the partitioned parameters.
    """

    def __init__(self, config: Mapping[str, Any], *, dtype: torch.dtype) -> None:
        from transformers.integrations import HfDeepSpeedConfig

        assert dist.is_initialized(), "partitions are laid out over the process group"
        self._config, self._dtype = dict(config), dtype
        self._swapper: Any = None  # to NVMe: a new one would empty the folder that the parts before went to
        self._alive = HfDeepSpeedConfig(dict(config))  # Transformers holds it only weakly

    def partition(self, name: str, part: nn.Module) -> None:
        """Keep this rank's share of a part's parameters; those that an earlier part has too are partitioned already."""
        import deepspeed

        part.to(self._dtype)
        init = deepspeed.zero.Init(module=part, config_dict_or_path=self._config, param_swapper=self._swapper)
        self._swapper = init.param_swapper

    def forget(self) -> None:
        """Let Transformers build plain models again in this process."""
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def assert_partitioned(module: nn.Module, *, small: int) -> None:
    """Check that this rank holds just its share of every parameter that is not small."""
    world_size = dist.get_world_size()
    for name, parameter in module.named_parameters():
        numel = getattr(parameter, "ds_numel", None)
        assert numel is not None, f"{name} was built outside of ZeRO-3"
        if numel <= small:
            continue
        own, share = parameter.ds_tensor.ds_numel, -(-numel // world_size)
        assert parameter.numel() == 0, f"{name} is whole on this rank: {numel} elements"
        assert own <= share + world_size, f"{name}: this rank holds {own} of {numel} elements, not 1/{world_size}"
