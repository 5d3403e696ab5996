"""Report of ``job=quantize``: perplexity, KL divergence and agreement, sizes and rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from launcher.config.quantization import Quantization
from launcher.data.dataloader import MicroBatch
from launcher.quantization.layers import GROUPS, LAYERS
from launcher.utils.schema import to_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Comparison of two models on the same tokens."""

    tokens: int
    perplexity_before: float
    perplexity_after: float
    divergence: float
    """Mean KL divergence of the later distribution from the earlier one, in nats a token."""
    agreement: float
    """Share of tokens at which both find the same one the most likely."""

    @property
    def growth(self) -> float:
        """By how much perplexity has grown: 0.01 is one percent."""
        return self.perplexity_after / self.perplexity_before - 1

    def rows(self) -> Iterator[str]:
        """Yield the rows of a table: what, before, after, ratio."""
        yield (
            f"| perplexity of {self.tokens:,} held-out tokens | {self.perplexity_before:.3f} "
            f"| {self.perplexity_after:.3f} | {1 + self.growth:.4f} |"
        )
        yield f"| KL divergence of the distributions, nats a token | | {self.divergence:.5f} | |"
        yield f"| same most likely token | | {self.agreement:.2%} | |"


def compare_models(
    before: PreTrainedModel,
    after: PreTrainedModel,
    batches: Iterable[MicroBatch],
    *,
    heartbeat: Callable[[], None],
) -> Fidelity:
    """Run both over the same batches; sums are of fp64, distributions of fp32."""

    def pairs() -> Iterator[LogitPair]:
        for batch in batches:
            one = model_logits(before, batch)
            heartbeat()
            other = model_logits(after, batch)
            heartbeat()
            yield one, other, batch

    with torch.inference_mode():
        return compare_logits(pairs())


LogitPair = tuple[Tensor, Tensor, MicroBatch]
"""Logits (sequences, tokens, vocabulary) of two models, and the batch that they are of."""


def compare_logits(pairs: Iterable[LogitPair]) -> Fidelity:
    """Compare the distributions of two models; sums are of fp64, distributions of fp32."""
    loss_before = loss_after = divergence = 0.0
    tokens = agreed = 0
    for logits_before, logits_after, batch in pairs:
        wanted = batch.labels.flatten() != _IGNORED
        labels = batch.labels.flatten()[wanted].to(logits_before.device)
        one, other = (each.flatten(0, 1)[wanted.to(each.device)].float() for each in (logits_before, logits_after))
        loss_before += float(cross_entropy(one, labels, reduction="none").double().sum())
        loss_after += float(cross_entropy(other, labels, reduction="none").double().sum())
        apart = kl_div(log_softmax(other, -1), log_softmax(one, -1), reduction="none", log_target=True)
        divergence += float(apart.sum(dim=-1).double().sum())
        agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
        tokens += len(labels)
    return Fidelity(
        tokens=tokens,
        perplexity_before=math.exp(loss_before / tokens),
        perplexity_after=math.exp(loss_after / tokens),
        divergence=divergence / tokens,
        agreement=agreed / tokens,
    )


def model_logits(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Return the logits (sequences, tokens, vocabulary) of a batch."""
    where = batch.position_ids
    positions = {} if where is None else {"position_ids": where.to(model.device)}
    logits: Tensor = model(input_ids=batch.input_ids.to(model.device), use_cache=False, **positions).logits
    return logits


BEFORE, AFTER = "before", "after"
_WAYS = {"forward": "plain forward passes", "engine": "the launcher's engine"}


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """A quantized model compared with its original."""

    model: str
    method: Quantization
    precision: str
    layers: int
    memory: Mapping[str, Mapping[str, int]]
    """Bytes by group, of ``before`` and ``after``."""
    matrices_bf16: int
    """Bytes of the quantized matrices in bf16."""
    disk: Mapping[str, int]
    """Bytes of weights in files; without ``before`` where they come from no files."""
    fidelity: Fidelity
    forward: Mapping[int, Mapping[str, list[dict[str, float]]]]
    engine: Mapping[int, Mapping[str, list[dict[str, float]]]]
    prompt: str
    samples: Mapping[str, str]

    @property
    def share_of_bf16(self) -> float:
        """Return the bytes of the quantized layers as a share of their matrices' in bf16."""
        return self.memory[AFTER][LAYERS] / self.matrices_bf16

    def metrics(self) -> dict[str, float]:
        """Return the findings by name."""
        kept = self.fidelity
        found = {
            "layers": float(self.layers),
            "share_of_bf16": self.share_of_bf16,
            "memory_before_bytes": float(sum(self.memory[BEFORE].values())),
            "memory_after_bytes": float(sum(self.memory[AFTER].values())),
            "disk_after_bytes": float(self.disk[AFTER]),
            "perplexity_before": kept.perplexity_before,
            "perplexity_after": kept.perplexity_after,
            "perplexity_growth": kept.growth,
            "divergence": kept.divergence,
            "agreement": kept.agreement,
        }
        for way, batch, quantity, before, after in self._speeds():
            found[f"{way}/{quantity}_at_{batch}_before"] = before
            found[f"{way}/{quantity}_at_{batch}_after"] = after
        return found

    def tree(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "model": self.model,
            "quantization": to_tree(self.method),
            "precision": self.precision,
            "layers": self.layers,
            "memory_bytes": {which: dict(groups) for which, groups in self.memory.items()},
            "matrices_bf16_bytes": self.matrices_bf16,
            "share_of_bf16": self.share_of_bf16,
            "disk_bytes": dict(self.disk),
            "fidelity": {**asdict(self.fidelity), "growth": self.fidelity.growth},
            "rates": {way: {str(batch): dict(rates) for batch, rates in getattr(self, way).items()} for way in _WAYS},
            "prompt": self.prompt,
            "samples": dict(self.samples),
            "metrics": self.metrics(),
        }

    def markdown(self, machine: Mapping[str, str]) -> Iterator[str]:
        """Yield the lines of a page."""
        yield from (f"# {self.model} by {self.method.kind}", "")
        yield f"{self.layers} layers, {self.share_of_bf16:.3f} of the bytes of their matrices in bf16."
        yield from ("", f"| | before ({self.precision}) | after | ratio |", "|---|---|---|---|")
        for name, size, kept_size in self._sizes():
            yield f"| {name} | {megabytes(size)} | {megabytes(kept_size)} | {ratio_text(kept_size, size)} |"
        yield from self.fidelity.rows()
        for way, batch, quantity, before, after in self._speeds():
            name = f"{quantity}, {batch} at a time, {_WAYS[way]}: tokens/s"
            yield f"| {name} | {before:,.1f} | {after:,.1f} | {after / before:.2f} |"
        yield from ("", *self._slower(), "", f"Both continue {self.prompt!r}:", "")
        yield from (f"- {which}: {text!r}" for which, text in self.samples.items())
        yield ""
        yield from (f"- {key}: {value}" for key, value in machine.items())

    def _sizes(self) -> Iterator[tuple[str, int | None, int]]:
        for group in GROUPS:
            yield f"{group}, in memory", self.memory[BEFORE][group], self.memory[AFTER][group]
        before, after = (sum(self.memory[which].values()) for which in (BEFORE, AFTER))
        yield "all, in memory", before, after
        yield "all, in files", self.disk.get(BEFORE), self.disk[AFTER]

    def _speeds(self) -> Iterator[tuple[str, int, str, float, float]]:
        """Yield way, batch, quantity and medians."""
        for way in _WAYS:
            for batch, rates in getattr(self, way).items():
                for quantity in ("prefill", "decode"):
                    before, after = (
                        statistics.median(taken[f"{quantity}_per_s"] for taken in rates[which])
                        for which in (BEFORE, AFTER)
                    )
                    yield way, batch, quantity, before, after

    def _slower(self) -> Iterator[str]:
        """Yield a line that says where the method costs time on this machine."""
        slower = [
            f"{quantity} of {batch} by {_WAYS[way]} ({after / before:.2f} ×)"
            for way, batch, quantity, before, after in self._speeds()
            if after < before
        ]
        if slower:
            yield f"Slower than before on this machine: {', '.join(slower)}."
        elif self.forward or self.engine:
            yield "Nothing that was measured is slower than before on this machine."


def megabytes(size: int | None) -> str:
    """Return a size as text; ``None`` is that of weights that come from no files."""
    return "not from files" if size is None else f"{size / 1e6:,.1f} MB"


def ratio_text(after: float, before: float | None) -> str:
    """Return a ratio as text; empty if there is nothing to compare with."""
    return f"{after / before:.3f}" if before else ""
