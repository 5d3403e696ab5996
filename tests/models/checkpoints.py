"""A checkpoint of any model, as two ranks that cut it flat would write it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from launcher.checkpoint.regions import Box, FlatRange, Region, slices, whole
from launcher.checkpoint.tensors import Shard, shard_file_name, write_shards
from launcher.engines.state import persistent_buffers
from launcher.models.weights import save_model_config
from launcher.protocol.state_files import MODEL_FOLDER, TENSOR_FOLDER


def part(name: str, tensor: torch.Tensor, region: Region) -> Shard:
    values = tensor[slices(region)] if isinstance(region, Box) else tensor.flatten()[region.start : region.stop]
    return Shard(name=name, shape=tuple(tensor.shape), region=region, dtype=tensor.dtype, read=lambda: values)


def checkpoint(folder: Path, model: PreTrainedModel) -> Path:
    """Write a model as two ranks of ZeRO would, moments included; return the folder to load it from."""
    (folder / TENSOR_FOLDER).mkdir(parents=True)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    tensors |= {f"exp_avg.{name}": torch.ones_like(value) for name, value in tensors.items()}
    ranks: list[list[Shard]] = [[], []]
    for name, value in tensors.items():
        half = value.numel() // 2
        ranks[0].append(part(name, value, FlatRange(0, half)))
        ranks[1].append(part(name, value, FlatRange(half, value.numel())))
    others = {"rng.00000.cpu": torch.zeros(8), **persistent_buffers(model)}
    ranks[0] += [part(name, value, whole(tuple(value.shape))) for name, value in others.items()]
    for rank, shards in enumerate(ranks):
        write_shards(folder / shard_file_name(rank), shards)
    save_model_config(model.config, folder / MODEL_FOLDER)
    return folder / MODEL_FOLDER
