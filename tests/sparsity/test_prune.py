"""Pruning of both families beside a float64 computation that shares no code, and what cannot be pruned."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sparsity_reference
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from launcher.benchmarks.sparsify import calibration_batches
from launcher.config.sparsity import Magnitude, Pruning, SparseGpt, Wanda
from launcher.data.rows import TokenRow
from launcher.errors import ConfigErrors, JobError
from launcher.models.layers import blocks
from launcher.quantization.layers import matrices
from launcher.sparsity.prune import CalibrationBatch, owl_shares, prune_model, zero_share

FAMILIES = ("gpt2", "llama")


@functools.cache
def stock(family: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "initializer_range": 0.2}
    config = {
        "gpt2": GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0, **sizes),
        "llama": LlamaConfig(
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
            **sizes,
        ),
    }[family]
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@functools.cache
def text() -> list[CalibrationBatch]:
    """Two whole batches, and a row that holds two documents."""
    ids = torch.randint(0, 50, (9, 24), generator=torch.Generator().manual_seed(1))
    packed = torch.cat((torch.arange(10), torch.arange(14)))[None]
    return [
        CalibrationBatch(input_ids=ids[:4]),
        CalibrationBatch(input_ids=ids[4:8]),
        CalibrationBatch(input_ids=ids[8:], position_ids=packed),
    ]


def weights(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in matrices(model).items():
        found[name] = (layer.weight.t() if isinstance(layer, Conv1D) else layer.weight).double()
    return found


METHODS: dict[str, Pruning] = {
    "magnitude": Magnitude(ratio=0.6),
    "magnitude 2:4": Magnitude(pattern="2:4"),
    "wanda": Wanda(),
    "wanda 4:8": Wanda(pattern="4:8"),
    "wanda 1:4": Wanda(pattern="1:4", ratio=0.75),
    "sparsegpt": SparseGpt(block_size=20),
    "sparsegpt 2:4": SparseGpt(pattern="2:4", block_size=16, damping=0.05),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_zeros_and_weights_are_those_of_a_float64_computation(name: str, family: str) -> None:
    method, model = METHODS[name], copy.deepcopy(stock(family))
    zeros = prune_model(model, method, text())
    expected = copy.deepcopy(stock(family)).double()
    with torch.no_grad():
        for _ in sparsity_reference.prune(expected, blocks(expected), text(), method):
            pass
    assert zeros.keys() == matrices(model).keys()
    for layer, wanted in weights(expected).items():
        found = weights(model)[layer]
        assert zeros[layer] == pytest.approx(method.zero_share, abs=1 / 32), "whole weights of rows or blocks"
        # rounding of fp32 decides about scores that are equal to six digits: none, or one in a thousand
        assert ((found == 0) == (wanted == 0)).double().mean() > 0.998, layer
        both = (found == 0) == (wanted == 0)
        error = ((found - wanted) * both).norm() / wanted.norm()
        assert error < 2e-3, f"{layer}: {error}"  # 1e-6 where no zero differs; one in SparseGPT moves its neighbours


def test_later_blocks_are_calibrated_on_pruned_ones() -> None:
    """As in the reference implementations: what the original returns gives other zeros in the second block."""
    pruned = copy.deepcopy(stock("llama"))
    prune_model(pruned, Wanda(ratio=0.7), text())
    alone = copy.deepcopy(stock("llama"))
    prune_model(alone, Wanda(ratio=0.7, skip=("model.layers.0.*",)), text())
    one, other = weights(pruned), weights(alone)
    second = [name for name in one if ".1." in name]
    assert any(not torch.equal(one[name] == 0, other[name] == 0) for name in second)
    assert all(torch.equal(other[name], weights(stock("llama"))[name]) for name in one if ".0." in name)


def test_sparsegpt_changes_outputs_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    ids = torch.cat([batch.input_ids for batch in text()[:2]])
    wanted = stock("llama")(input_ids=ids, use_cache=False).logits
    errors = []
    for method in (SparseGpt(), Wanda(), Magnitude()):
        model = copy.deepcopy(stock("llama"))
        prune_model(model, method, text())
        errors.append(float((model(input_ids=ids, use_cache=False).logits - wanted).norm()))
    assert errors == sorted(errors)


def test_owl_gives_blocks_with_more_outliers_fewer_zeros() -> None:
    assert owl_shares([0.01, 0.03, 0.02], share=0.7, spread=0.2) == pytest.approx([0.8, 0.6, 0.7])
    assert owl_shares([0.01, 0.01], share=0.7, spread=0.2) == [0.7, 0.7]
    model = copy.deepcopy(stock("llama"))
    second = blocks(model)[1]
    with torch.no_grad():
        second.mlp.up_proj.weight[:3] *= 50  # outliers
    zeros = prune_model(model, Wanda(allocation="owl", owl_m=10.0, owl_lambda=0.1), text())
    by_block = [{share for name, share in zeros.items() if f".{number}." in name} for number in (0, 1)]
    assert min(by_block[0]) > 0.5 > max(by_block[1])
    assert sum(map(max, by_block)) == pytest.approx(1.0, abs=0.1), "the mean is the ratio"
    model = copy.deepcopy(stock("llama"))
    zeros = prune_model(model, Wanda(allocation="owl", skip=("model.layers.0.*",)), text())
    assert set(zeros.values()) == {0.5}, "a block without pruned layers counts as none"


def test_layers_that_are_skipped_stay() -> None:
    model, name = copy.deepcopy(stock("gpt2")), "transformer.h.1.mlp.c_proj"
    zeros = prune_model(model, SparseGpt(skip=("*.mlp.c_proj",)), text())
    assert name not in zeros
    assert len(zeros) == 6
    assert torch.equal(model.get_submodule(name).weight, stock("gpt2").get_submodule(name).weight)
    head = model.lm_head.weight
    assert torch.equal(head, stock("gpt2").lm_head.weight)


def dead_input(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight[5] = 0.0


def no_input(model: Any) -> None:
    model.model.layers[1].post_attention_layernorm.weight.zero_()


def infinite_weight(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight[0] = torch.inf


def all_zero(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.weight.zero_()


@pytest.mark.parametrize(
    ("change", "methods", "said"),
    [
        (no_input, (Wanda(), SparseGpt()), "all inputs of model.layers.1.mlp.gate_proj are zero in the calibration"),
        (infinite_weight, (Wanda(), SparseGpt()), "are not finite"),
        (all_zero, (Magnitude(), Wanda()), "model.layers.1.self_attn.v_proj has no weight left that is not zero"),
    ],
)
def test_what_cannot_be_calibrated_is_named(change: Any, methods: Sequence[Pruning], said: str) -> None:
    for method in methods:
        model = copy.deepcopy(stock("llama"))
        with torch.no_grad():
            change(model)
        with pytest.raises(JobError, match=said.replace(".", r"\.")):
            prune_model(model, method, text())


def test_weights_of_an_input_that_is_always_zero_become_zero() -> None:
    model = copy.deepcopy(stock("llama"))
    with torch.no_grad():
        dead_input(model)
    prune_model(model, SparseGpt(), text())
    first = model.model.layers[0].self_attn.q_proj
    assert not first.weight[:, 5].any()
    assert 0.5 <= zero_share(first) < 0.55


def test_a_width_that_groups_do_not_divide_is_named_before_anything_runs() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(30, 8)])

    with pytest.raises(ConfigErrors, match=r"layers\.0 has 30 inputs, which groups of 4 do not divide"):
        prune_model(Odd(), Wanda(pattern="2:4"), [])


def test_calibration_text_has_no_padding(capsys: pytest.CaptureFixture[str]) -> None:
    """Padding would count as input; rows of one length share a batch."""
    lengths = [3, 5, 3, 3]
    rows = [
        TokenRow(input_ids=np.full(length, number), labels=np.zeros(length, np.int64))
        for number, length in enumerate(lengths)
    ]
    rows[2] = replace(rows[2], position_ids=np.array([0, 0, 1]))
    train: Any = SimpleNamespace(num_sequences=4, row=rows.__getitem__)
    splits: Any = SimpleNamespace(train=train, train_order=SimpleNamespace(index=lambda seed, at: (at + seed) % 4))
    job: Any = SimpleNamespace(seed=1, micro_batch=2)
    found = calibration_batches(Wanda(calibration_sequences=9), job, splits)
    assert [batch.input_ids.tolist() for batch in found] == [[[2] * 3, [3] * 3], [[0] * 3], [[1] * 5]]
    assert [batch.position_ids if batch.position_ids is None else batch.position_ids.tolist() for batch in found] == [
        [[0, 0, 1], [0, 1, 2]],
        None,
        None,
    ]
    assert "the data has 4 training sequences, which are all taken" in capsys.readouterr().out
