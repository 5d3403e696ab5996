"""What is recomputed, and that it changes no gradient by a bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.config.activation import (
    ActivationCheckpointing,
    FullCheckpointing,
    NoCheckpointing,
    OffloadCheckpointing,
    SelectiveCheckpointing,
)
from launcher.config.attention import SdpaAttention
from launcher.config.model.gpt2 import Gpt2
from launcher.errors import ConfigError
from launcher.models import transforms
from launcher.models.build import build_model
from launcher.models.transforms import apply_activation_checkpointing

LAYERS, WIDTH = 5, 16
SIZES: dict[str, Any] = {
    "name": "small",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "hidden_size": WIDTH,
    "max_position_embeddings": 32,
    "vocab_size": 99,
}
IDS = torch.arange(24).view(2, 12)
POLICIES = {
    "full": (FullCheckpointing(), {0, 1, 2, 3, 4}),
    "every second": (SelectiveCheckpointing(), {0, 2, 4}),
    "every third": (SelectiveCheckpointing(k=3), {0, 3}),
    "every": (SelectiveCheckpointing(k=1), {0, 1, 2, 3, 4}),
    "offload": (OffloadCheckpointing(), {0, 1, 2, 3, 4}),
}


def built(activation: ActivationCheckpointing) -> Any:
    return build_model(Gpt2(**SIZES), seed=1, attention=SdpaAttention(), activation=activation)


@contextmanager
def forward_passes(module: Any) -> Iterator[list[int]]:
    """Count how often the MLP of each block runs."""
    counts = [0] * LAYERS
    with pytest.MonkeyPatch.context() as patch:
        for number, block in enumerate(module.transformer.h):
            original = block.mlp.forward

            def counted(*args: Any, number: int = number, original: Any = original) -> Any:
                counts[number] += 1
                return original(*args)

            patch.setattr(block.mlp, "forward", counted)
        yield counts


def gradients(module: Any) -> list[Tensor]:
    module(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("name", POLICIES)
def test_the_right_blocks_run_twice_and_gradients_are_equal_to_the_bit(name: str) -> None:
    activation, twice = POLICIES[name]
    module = built(activation)
    with forward_passes(module) as counts:
        ours = gradients(module)
    assert counts == [2 if number in twice else 1 for number in range(LAYERS)]
    for mine, expected in zip(ours, gradients(built(NoCheckpointing())), strict=True):
        assert torch.equal(mine, expected)


def test_dropout_is_drawn_alike_when_it_is_recomputed() -> None:
    found = []
    for activation in (NoCheckpointing(), SelectiveCheckpointing(), OffloadCheckpointing()):
        module = build_model(Gpt2(**SIZES, dropout=0.2), seed=1, attention=SdpaAttention(), activation=activation)
        torch.manual_seed(5)
        found.append(gradients(module))
    for others in found[1:]:
        assert all(torch.equal(mine, expected) for mine, expected in zip(found[0], others, strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_recomputed_in_evaluation(name: str) -> None:
    module = built(POLICIES[name][0]).eval()
    with forward_passes(module) as counts:
        module(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert counts == [1] * LAYERS


def test_offload_moves_the_inputs_of_blocks_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, ...]] = []

    class Recorded(torch.autograd.graph.saved_tensors_hooks):
        """Stands in for ``save_on_cpu``, which moves nothing that is on the CPU already."""

        def __init__(self, *, pin_memory: bool) -> None:
            assert not pin_memory, "there is no GPU to copy from"
            super().__init__(self.pack, lambda tensor: tensor.clone())

        def pack(self, tensor: Tensor) -> Tensor:
            moved.append(tuple(tensor.shape))
            return tensor.clone()

    monkeypatch.setattr(transforms.torch.autograd.graph, "save_on_cpu", Recorded)
    ours = gradients(built(OffloadCheckpointing()))
    assert moved == [(2, 12, WIDTH)] * LAYERS
    assert all(
        torch.equal(mine, expected) for mine, expected in zip(ours, gradients(built(NoCheckpointing())), strict=True)
    )


def test_a_pipeline_stage_takes_it_too() -> None:
    stage = nn.ModuleList(built(NoCheckpointing()).transformer.h[2:])
    apply_activation_checkpointing(stage, SelectiveCheckpointing())
    assert [block.gradient_checkpointing for block in stage] == [True, False, True]


def test_a_module_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation=every_k: .*checkpointing for Linear; set activation=none"):
        apply_activation_checkpointing(nn.Linear(2, 2), SelectiveCheckpointing())
    apply_activation_checkpointing(nn.Linear(2, 2), NoCheckpointing())
