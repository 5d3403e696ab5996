"""What every model keeps, and every transform of one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from launcher.checkpoint.tensors import shard_file_name, write_shards
from launcher.config.activation import NoCheckpointing
from launcher.config.run import Run
from launcher.engines.state import persistent_buffers, shards_of
from launcher.models.build import build_model
from launcher.models.layers import blocks
from launcher.models.weights import save_model_config
from launcher.protocol.state_files import MODEL_FOLDER, TENSOR_FOLDER
from launcher.testing.base import PartContract


def _build(
    run: Run, *, seed: int = 0, weights: Path | None = None, transforms: tuple[str, ...] = ()
) -> PreTrainedModel:
    model = run.model if weights is None else dataclasses.replace(run.model, weights=str(weights))
    return build_model(model, seed=seed, attention=run.attention, activation=NoCheckpointing(), transforms=transforms)


def save_weights(model: PreTrainedModel, checkpoint: Path) -> Path:
    """Write a model's weights as a checkpoint has them; return what ``model.weights`` takes."""
    (checkpoint / TENSOR_FOLDER).mkdir(parents=True)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_shards(checkpoint / shard_file_name(0), shards_of(weights | persistent_buffers(model)))
    folder = checkpoint / MODEL_FOLDER
    save_model_config(model.config, folder)
    return folder


class ModelContract(PartContract):
    """Checks of one model of a few million parameters: the plan's figures, causality, weights."""

    @pytest.fixture
    def model(self, configured: Run) -> PreTrainedModel:
        """Return the model on this machine, without dropout."""
        return _build(configured).eval()

    def test_the_plan_calculates_with_its_sizes(self, configured: Run, model: PreTrainedModel) -> None:
        """The shape that a plan estimates memory and time by is that of the built model."""
        shape = configured.model.shape()
        assert shape is not None
        sizes = [parameter.numel() for parameter in model.parameters()]
        assert (shape.num_params, shape.largest_param) == (sum(sizes), max(sizes))
        assert shape.num_hidden_layers == len(blocks(model))
        assert shape.block_params == sum(parameter.numel() for parameter in blocks(model)[0].parameters())
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert tuple(embedding.shape) == (shape.vocab_size, shape.hidden_size)
        assert shape.tie_word_embeddings == (embedding is head)

    def test_a_token_sees_only_those_before_it(self, configured: Run, model: PreTrainedModel) -> None:
        """Logits of other tokens stay when the last one changes."""
        shape = configured.model.shape()
        assert shape is not None
        tokens = torch.arange(8).remainder(shape.vocab_size).reshape(1, 8)
        changed = tokens.clone()
        changed[0, -1] = shape.vocab_size - 1
        with torch.no_grad():
            one, other = (model(input_ids=ids, use_cache=False).logits for ids in (tokens, changed))
        assert tuple(one.shape) == (1, 8, shape.vocab_size)
        torch.testing.assert_close(one[:, :-1], other[:, :-1])
        assert not torch.equal(one[:, -1], other[:, -1])

    def test_every_parameter_learns(self, configured: Run, model: PreTrainedModel) -> None:
        """A parameter without a gradient would stay as it was drawn."""
        tokens = torch.arange(8).reshape(1, 8)
        logits = model(input_ids=tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert without == []

    def test_the_seed_decides_the_weights(self, configured: Run, model: PreTrainedModel) -> None:
        """Ranks draw the same weights from one seed."""
        weights, again, other = (
            dict(each.state_dict()) for each in (model, _build(configured), _build(configured, seed=1))
        )
        assert all(torch.equal(value, again[name]) for name, value in weights.items())
        assert any(not torch.equal(value, other[name]) for name, value in weights.items())

    def test_saved_weights_come_back(self, configured: Run, model: PreTrainedModel, tmp_path: Path) -> None:
        """What a checkpoint holds is what ``model.weights`` loads."""
        loaded = _build(configured, seed=1, weights=save_weights(model, tmp_path)).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


class TransformContract(PartContract):
    """Checks of one transform, on the model that the overrides choose."""

    name: ClassVar[str]
    """As ``job.transforms`` names it."""

    def test_every_rank_gets_the_same_model(self, configured: Run) -> None:
        """Names, values and what is trained are the same each time; every value is finite."""
        one, other = (_build(configured, transforms=(self.name,)) for _ in range(2))
        values = dict(other.named_parameters())
        assert list(dict(one.named_parameters())) == list(values)
        for name, parameter in one.named_parameters():
            assert torch.equal(parameter, values[name]), name
            assert parameter.requires_grad == values[name].requires_grad, name
            assert bool(parameter.isfinite().all()), name
        assert any(parameter.requires_grad for parameter in one.parameters())

    def test_the_model_computes_logits(self, configured: Run) -> None:
        """It is a causal language model still."""
        model = _build(configured, transforms=(self.name,)).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False).logits
        assert bool(logits.isfinite().all())
