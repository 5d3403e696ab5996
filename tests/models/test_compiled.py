"""Compilation of blocks: in place, once for all of them, and out of the way of generation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config.activation import ActivationCheckpointing, NoCheckpointing, SelectiveCheckpointing
from launcher.config.attention import Attention, FlashAttention, SdpaAttention
from launcher.config.compile import NoCompile, RegionalCompile
from launcher.config.model.gpt2 import Gpt2
from launcher.engines.generate import generate_greedily
from launcher.errors import ConfigError
from launcher.models.build import build_model
from launcher.models.transforms import apply_compile
from launcher.utils.build_cache import lacks_compiler

SIZES: dict[str, Any] = {
    "name": "small",
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "max_position_embeddings": 32,
    "vocab_size": 99,
}
IDS = torch.arange(24).view(2, 12)
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns its own authors


@pytest.fixture(autouse=True)
def counters() -> Iterator[Any]:
    """What torch's compiler counts, from nothing."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def built(activation: ActivationCheckpointing, attention: Attention) -> Any:
    return build_model(Gpt2(**SIZES), seed=1, attention=attention, activation=activation)


@pytest.mark.parametrize(
    ("activation", "attention", "graphs"),
    [(NoCheckpointing(), SdpaAttention(), 1), (SelectiveCheckpointing(), FlashAttention(), 2)],
    ids=["plain", "mixed"],
)
def test_blocks_share_what_is_compiled_and_gradients_stay(
    counters: Any, activation: ActivationCheckpointing, attention: Attention, graphs: int
) -> None:
    found = []
    for compile_ in (RegionalCompile(), NoCompile()):
        module = built(activation, attention)
        names = list(module.state_dict())
        apply_compile(module, compile_, device=CPU)
        assert list(module.state_dict()) == names
        module(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    assert counters["stats"]["unique_graphs"] == graphs
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)


def test_generation_compiles_nothing(counters: Any) -> None:
    module = built(NoCheckpointing(), SdpaAttention()).eval()
    plain = generate_greedily(module, IDS[:1], max_new_tokens=8)
    apply_compile(module, RegionalCompile(), device=CPU)
    assert torch.equal(generate_greedily(module, IDS[:1], max_new_tokens=8), plain)
    assert not counters["stats"]["unique_graphs"]


def test_what_cannot_be_compiled_whole_ends_the_run() -> None:
    module = built(NoCheckpointing(), SdpaAttention())
    module.transformer.h[0].ln_1.register_forward_pre_hook(torch.compiler.disable(lambda *_: None))
    apply_compile(module, RegionalCompile(), device=CPU)
    with pytest.raises(Exception, match="disable"):
        module(input_ids=IDS, use_cache=False)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="compile=true: Linear has no blocks"):
        apply_compile(nn.Linear(2, 2), RegionalCompile(), device=CPU)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match=r"compile=true: .*C\+\+ compiler.*apt-get install g\+\+"):
        apply_compile(built(NoCheckpointing(), SdpaAttention()), RegionalCompile(), device=CPU)
    assert [error.option for error in RegionalCompile().validate_machine()] == ["compile"]
    assert not lacks_compiler({}, which=lambda name: f"/usr/bin/{name}" if name == "g++" else None)
    assert not lacks_compiler({"CXX": "icpx"}, which=lambda name: f"/opt/{name}" if name == "icpx" else None)
