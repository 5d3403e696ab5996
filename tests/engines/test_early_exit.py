"""Exits are trained and layers dropped alike under every strategy, and when activations are recomputed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from launcher.config.compose import compose
from launcher.config.job.train import Train
from launcher.config.validate import validate_overrides_used
from launcher.data.dataloader import MicroBatch
from launcher.engines.early_exit import EarlyExitLoss, exit_weights
from launcher.engines.loss import token_loss_sum
from launcher.errors import ConfigErrors

from .conftest import losses

STEPS = 3
OPTIONS = {"early_exit_loss": 0.5, "early_exit_rotation": 2, "layer_dropout": 0.5}
HALF = {"micro_batch": 4, "gradient_accumulation_steps": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("gpt2", {"parallel": {"kind": "ddp"}, "job": HALF}),
    "zero0": ("gpt2", {"parallel": {"kind": "zero", "stage": 0}}),
    "zero1": ("llama", {"parallel": {"kind": "zero", "stage": 1}}),
    "zero2": ("llama", {"parallel": {"kind": "zero", "stage": 2}}),
    "zero3": (
        "llama",
        {"parallel": {"kind": "zero", "stage": 3, "persistence_threshold": 0}, "activation": {"kind": "full"}},
    ),
    "fsdp": ("gpt2", {"parallel": {"kind": "fsdp"}, "activation": {"kind": "full"}}),
}
PLANT = "rows_are_numbered_by_each_rank"


def case(name: str, family: str, groups: dict[str, Any], *, world: int = 2, **rest: Any) -> dict[str, Any]:
    job = {**OPTIONS, **groups.get("job", {})}
    lr = 1e-3 if family == "llama" else 3e-3
    return {
        "name": name,
        "family": family,
        "world": world,
        "steps": STEPS,
        "lr": lr,
        "run": {**groups, "job": job},
        **rest,
    }


@pytest.fixture(scope="module")
def answers(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    alone = {"parallel": {"kind": "single"}, "job": {"micro_batch": 16}}
    cases = [case(f"single_{family}", family, alone, world=1) for family in ("gpt2", "llama")]
    cases += [case(name, family, groups) for name, (family, groups) in CASES.items()]
    cases.append(case(PLANT, *CASES["ddp"], plant=PLANT))
    return run_cases(cases, tmp_path_factory.mktemp("early_exit"))


def same(answers: dict[str, Any], name: str, other: str) -> bool:
    return losses(answers[name]) == pytest.approx(losses(answers[other]), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_strategy_equals_one_process(answers: dict[str, Any], name: str) -> None:
    family = CASES[name][0]
    assert same(answers, name, f"single_{family}")
    for ours, expected in zip(answers[name]["steps"], answers[f"single_{family}"]["steps"], strict=True):
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert (ours["tokens"], ours["skipped"]) == (expected["tokens"], False)


def test_drops_that_depend_on_the_rank_are_seen(answers: dict[str, Any]) -> None:
    assert not same(answers, PLANT, "single_gpt2")


def loss_by_hand(model: Any, batch: MicroBatch, weights: dict[int, float]) -> torch.Tensor:
    """Return the loss by the stock model's own hidden states."""
    found = model(batch.input_ids, output_hidden_states=True, use_cache=False)
    total = torch.zeros(())
    for number, weight in weights.items():
        hidden = found.hidden_states[number + 1]
        if number < len(model.base_model.layers) - 1:  # that after the last layer has passed the norm
            hidden = model.base_model.norm(hidden)
        logits = model.lm_head(hidden).flatten(0, 1)
        total = total + weight * cross_entropy(logits, batch.labels.flatten(), reduction="sum")
    return total


@pytest.fixture
def llama(weights: dict[str, str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(weights["llama"]).train()


def batch_of(*drawn: int, step: int = 0) -> MicroBatch:
    ids = torch.randint(256, (len(drawn), 9), generator=torch.Generator().manual_seed(3))
    return MicroBatch(input_ids=ids[:, :-1], labels=ids[:, 1:], drawn=torch.tensor(drawn), step=step)


def test_the_loss_is_the_weighted_mean_of_those_after_each_exit(llama: Any) -> None:
    job, batch = Train(early_exit_loss=0.5, early_exit_curriculum="all"), batch_of(0, 1, 2)
    weights = dict(exit_weights(job, 0, 4))
    expected = loss_by_hand(llama, batch, weights)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}
    llama.zero_grad()
    exits = EarlyExitLoss(job, llama)
    loss = token_loss_sum(llama, batch, device=torch.device("cpu"), exits=exits)
    loss.backward()
    # fp32 sums in another order
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    plain = token_loss_sum(llama, batch, device=torch.device("cpu"))
    assert plain.item() == pytest.approx(loss_by_hand(llama, batch, {3: 1.0}).item(), rel=1e-5)


def test_a_dropped_layer_changes_nothing_of_its_sequence(llama: Any) -> None:
    exits = EarlyExitLoss(Train(layer_dropout=0.9, seed=7), llama)
    device = torch.device("cpu")
    drawn = tuple(range(12))
    kept = exits._kept(batch_of(*drawn), device)
    assert kept is not None
    assert kept[:, 0].all(), "the first layer is never dropped"
    assert 0 < int(kept[:, -1].sum()) < len(drawn)
    again = exits._kept(batch_of(*reversed(drawn)), device)
    assert again is not None
    assert torch.equal(kept, again.flip(0)), "drops are of the sequence, wherever it is"
    with torch.no_grad():
        together = token_loss_sum(llama, batch_of(*drawn), device=device, exits=exits)
        expected = 0.0
        whole = batch_of(*drawn)
        for row in range(len(drawn)):
            one = MicroBatch(input_ids=whole.input_ids[[row]], labels=whole.labels[[row]])
            layers = list(llama.base_model.layers)
            llama.base_model.layers = torch.nn.ModuleList(
                [layer for layer, stays in zip(layers, kept[row].tolist(), strict=True) if stays]
            )
            llama.eval()
            expected += token_loss_sum(llama, one, device=device).item()
            llama.base_model.layers = torch.nn.ModuleList(layers)
            llama.train()
    assert together.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "exits"),
    [
        ({"early_exit_curriculum": "all"}, [[1, 2, 3, 4, 5]] * 3),
        ({"early_exit_rotation": 3}, [[3], [1, 4], [2, 5]]),
        ({"early_exit_curriculum": "gradual", "steps": 12}, [[], [5], [4, 5]]),
    ],
)
def test_exits_of_a_step(options: dict[str, Any], exits: list[list[int]]) -> None:
    job = Train(early_exit_loss=0.2, **options)
    found = [exit_weights(job, step, 7) for step in range(3)]
    assert [sorted(weights)[:-1] for weights in found] == exits
    for weights in found:
        assert sum(weights.values()) == pytest.approx(1)
        assert max(weights) == 6
        assert weights[6] > 0.5
    assert exit_weights(Train(layer_dropout=0.1), 0, 7) == {6: 1.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("job.early_exit_loss=0.2", "parallel=pipeline", "backend.ranks=2"), "no rank has the whole model"),
        (("job.layer_dropout=0.1", "parallel=tensor", "backend.ranks=2"), "splits the output head"),
        (("job.early_exit_loss=0.2", "compile=true"), "set compile=false"),
        (("job.layer_dropout=1",), "from 0 to below 1"),
        (("job.early_exit_loss=-1",), "at least 0"),
        (("job.early_exit_loss=0.2", "job.early_exit_curriculum=gradual", "job.epochs=1"), "set job.steps"),
        (("job.early_exit_loss=0.2", "job.objective=dpo"), "has no exits"),
    ],
)
def test_what_has_no_exits_is_refused(plan_of: Any, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigErrors, match=said):
        plan_of("model=llama_tiny", "data=synthetic", *words)


def test_options_of_exits_are_in_the_plan(plan_of: Any) -> None:
    plan = plan_of("model=llama_tiny", "data=synthetic", "job.early_exit_loss=0.2", "job.layer_dropout=0.1")
    text = str(plan)
    assert "after one in 8 layers" in text
    assert "to 0.1 at the last" in text


@pytest.mark.parametrize(
    "words", [["job.early_exit_rotation=2"], ["job.early_exit_loss=1", "job.early_exit_curriculum=all"]]
)
def test_options_of_exits_without_effect_are_refused(words: list[str]) -> None:
    words = ["model=llama_tiny", "data=synthetic", "tracker=local", *words]
    if len(words) > 4:
        assert not list(validate_overrides_used(compose(words).run, words))
        words.append("job.early_exit_rotation=2")
    (error,) = validate_overrides_used(compose(words).run, words)
    assert str(error).startswith("job.early_exit_rotation")
