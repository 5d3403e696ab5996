"""Losses of the sources of a batch, and logits of the labels that count alone: the numbers of whole logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from launcher.engines import loss as cross_entropy
from launcher.engines.loss import places_of_all, token_loss_sum
from launcher.engines.preferences import DpoLoss
from launcher.engines.source_losses import SourceLosses
from tests.engines.test_head import CPU, FUSED, OTHERS, VOCABULARY, error, gradients, micro_batch, model

IGNORED = -100
SOURCES = torch.tensor([1, 0, 1])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * VOCABULARY * 7)


def token_losses(module: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    logits = module(input_ids=ids, use_cache=False).logits.float()
    found = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return found.view(labels.shape)


def function(logits: Tensor, labels: Tensor) -> Tensor:
    return 2 * nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@pytest.mark.parametrize("name", ["gpt2", "llama tied", "gemma2"])
@pytest.mark.parametrize("how", ["labels", "observed", "plugin"])
def test_the_losses_of_sources_are_those_of_their_rows(name: str, how: str) -> None:
    """Both sources once, of which one has a row without labels; the loss and its gradient stay what they were."""
    module, batch = model({**FUSED, **OTHERS}[name]), replace(micro_batch(), sources=SOURCES)
    sums = SourceLosses(3, device=CPU)
    options = {"plugin": {"function": function}, "observed": {"observe": lambda *_: None}}.get(how, {})
    alone = token_loss_sum(module, replace(batch, sources=None), device=CPU, **options)
    loss = token_loss_sum(module, batch, device=CPU, by_source=sums, **options)
    assert loss.item() == alone.item()
    assert error(gradients(module, loss), gradients(module, alone)) == 0
    with torch.no_grad():
        rows = token_losses(module, batch.input_ids, batch.labels).sum(dim=1) * (2 if how == "plugin" else 1)
    counts = (batch.labels != IGNORED).sum(dim=1)
    expected = [float(rows[source == SOURCES].sum() / counts[source == SOURCES].sum()) for source in (0, 1)]
    assert sums.take() == [pytest.approx(expected[0], rel=1e-6), pytest.approx(expected[1], rel=1e-6), None]
    assert sums.take() == [None, None, None]


def test_nan_stays_with_the_source_that_has_it() -> None:
    sums = SourceLosses(2, device=CPU)
    losses, counts = torch.tensor([1.0, float("nan"), 3.0, float("nan")]), torch.tensor([True, True, True, False])
    sums.add(losses, counts, torch.tensor([0, 1, 0, 0]))
    healthy, broken = sums.take()
    assert healthy == 2
    assert broken is not None
    assert broken != broken


@pytest.mark.parametrize("name", ["gpt2", "llama tied", "gemma2"])
def test_pairs_take_logits_of_answers_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradient and losses of sources of preferences, against all logits."""
    module = model({**FUSED, **OTHERS}[name])
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (6, 13), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, :7] = IGNORED
    labels[4, 9:] = IGNORED
    reference = torch.randn(6, generator=generator)
    batch = replace(micro_batch(), input_ids=ids[:, :-1], labels=labels, is_paired=True, reference=reference)
    batch = replace(batch, sources=SOURCES)
    rows, log_softmax = [], cross_entropy._log_softmax

    def counted(logits: Tensor) -> Tensor:
        rows.append(len(logits))
        return log_softmax(logits)

    monkeypatch.setattr(cross_entropy, "_log_softmax", counted)
    sums, dpo = SourceLosses(2, device=CPU), DpoLoss(beta=0.3, label_smoothing=0.1, device=CPU)
    loss = token_loss_sum(module, batch, device=CPU, preferences=dpo, by_source=sums)
    num_labels = int((labels != IGNORED).sum())
    assert sum(rows) == (num_labels if name in FUSED else labels.numel())
    log_probs = -token_losses(module, batch.input_ids, labels).sum(dim=1)
    chosen, rejected = (log_probs - reference).chunk(2)
    margin = 0.3 * (chosen - rejected)
    logsigmoid = nn.functional.logsigmoid
    expected = -logsigmoid(margin) * 0.9 - logsigmoid(-margin) * 0.1
    assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert error(gradients(module, loss), gradients(module, expected.sum())) < 1e-5
    found = [float(expected.detach()[source == SOURCES].mean()) for source in (0, 1)]
    assert sums.take() == pytest.approx(found, rel=1e-6)
    assert dpo.take_metrics().labels_per_pair == pytest.approx(num_labels / 3)


def test_the_reference_is_what_the_model_itself_says() -> None:
    module, batch = model(FUSED["llama"]), replace(micro_batch(), is_paired=True)
    batch = replace(batch, input_ids=batch.input_ids[:2], labels=batch.labels[:2])
    dpo = DpoLoss(beta=0.1, label_smoothing=0.0, device=CPU)
    with dpo.collecting() as found, torch.no_grad():
        assert token_loss_sum(module, batch, device=CPU, preferences=dpo).item() == 0
    (log_probs,) = found
    assert dpo.take_metrics().rewards == {}
    known = replace(batch, reference=log_probs)
    assert token_loss_sum(module, known, device=CPU, preferences=dpo).item() == pytest.approx(0.6931471806, abs=1e-7)


def test_places_of_several_micro_batches_are_filled_up_with_labels_that_do_not_count() -> None:
    labels = torch.full((3, 2, 5), IGNORED)
    labels[0, 0, 1:4] = 7
    labels[2, 1, 4] = 7
    places = places_of_all(list(labels))
    assert places is not None
    assert places.shape == (3, 3)
    for each, chosen in zip(labels, places, strict=True):
        counted = each.flatten()[chosen] != IGNORED
        assert chosen[counted].tolist() == (each.flatten() != IGNORED).nonzero().flatten().tolist()
        assert len(set(chosen.tolist())) == 3
    assert places_of_all([torch.ones(2, 2, dtype=torch.int64), torch.full((2, 2), IGNORED)]) is None
