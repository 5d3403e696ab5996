"""Next-token loss, chunk by chunk: no fp32 copy of all logits is ever held.

Both cross-entropies equal ``cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")`` within
rounding. The first replaces the output projection too, so that the logits never exist as a whole in any format (the
idea of Liger Kernel's fused linear cross-entropy, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from launcher.data.rows import IGNORE_INDEX
from launcher.engines.source_losses import sources_of_tokens
from launcher.plugins.base import CROSS_ENTROPY, LOSS
from launcher.plugins.loading import executor

if TYPE_CHECKING:
    from launcher.config.run import BatchedJob
    from launcher.data.dataloader import MicroBatch
    from launcher.engines.base import Observer
    from launcher.engines.preferences import DpoLoss
    from launcher.engines.source_losses import SourceLosses, TokenSources


LossFunction = Callable[[Tensor, Tensor], Tensor]
"""From logits and labels to the loss summed over the labelled tokens, an fp32 scalar.

Logits are (sequences, tokens, vocabulary), labels (sequences, tokens), ``IGNORE_INDEX`` where none counts."""


class ExitLosses(Protocol):
    """Losses after early layers, besides that after the last one."""

    def at_head(
        self, micro_batch: MicroBatch, labels: Tensor, places: Tensor | None, of_sources: TokenSources | None
    ) -> AbstractContextManager[None]:
        """Return a context in which a forward pass returns the loss, summed over labelled tokens."""


def loss_function(job: BatchedJob) -> LossFunction | None:
    """Return the loss of a plugin that a job trains on; ``None`` for cross-entropy."""
    name = getattr(job, "loss", CROSS_ENTROPY)
    return None if name == CROSS_ENTROPY else cast("LossFunction", executor(LOSS, name, {}))


def token_loss_sum(
    module: nn.Module,
    micro_batch: MicroBatch,
    *,
    device: torch.device,
    function: LossFunction | None = None,
    observe: Observer | None = None,
    preferences: DpoLoss | None = None,
    by_source: SourceLosses | None = None,
    exits: ExitLosses | None = None,
) -> Tensor:
    """Return the loss summed over labelled tokens or pairs, an fp32 scalar on ``device``.

    Args:
        module: a causal language model of Transformers, or what wraps it.
        micro_batch: on any device.
        device: of the module.
        function: computes it from all logits; by default it is cross-entropy, of which no rank holds all.
        observe: gets all logits, and the labels.
        preferences: computes the loss of batches of pairs.
        by_source: adds up the same loss by the sources of a mixture.
        exits: computes the loss, of exits too.
    """
    input_ids = micro_batch.input_ids.to(device, non_blocking=True)
    labels = micro_batch.labels.to(device, non_blocking=True)
    where = micro_batch.position_ids
    inputs = {} if where is None else {"position_ids": where.to(device, non_blocking=True)}
    inputs |= {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.arrays.items()}
    needs_all = function is not None or observe is not None
    places = None if needs_all else counted_places(micro_batch.labels, device)
    of_sources = sources_of_tokens(None if micro_batch.is_paired else by_source, micro_batch.sources, labels)
    at_head = (
        _head(module, labels, places, of_sources, paired=micro_batch.is_paired, whole=needs_all)
        if exits is None
        else exits.at_head(micro_batch, labels, places, of_sources)
    )
    with at_head:
        output = module(input_ids=input_ids, use_cache=False, **inputs).logits
    if observe is not None:
        observe(output, labels)
    if micro_batch.is_paired:
        assert preferences is not None, "a job on pairs has their loss"
        log_probs = row_log_probs(output, labels, places)
        if by_source is None or micro_batch.sources is None:
            return preferences(log_probs, micro_batch.reference, labels)
        sources = micro_batch.sources.to(device, non_blocking=True)
        return preferences(log_probs, micro_batch.reference, labels, partial(by_source.add, sources=sources))
    if function is None:
        return loss_of(output, labels, of_sources)
    if by_source is not None and micro_batch.sources is not None:
        plugin, logits = function, output.detach()
        by_source.add_rows(labels, micro_batch.sources, lambda rows: plugin(logits[rows], labels[rows]))
    return function(output, labels)


def _head(
    module: nn.Module,
    labels: Tensor,
    places: Tensor | None,
    of_sources: TokenSources | None,
    *,
    paired: bool,
    whole: bool,
) -> AbstractContextManager[None]:
    if whole:
        return nullcontext()
    return logits_at_places(module, places) if paired else labels_at_head(module, labels, places, of_sources)


def counted_places(labels: Tensor, device: torch.device) -> Tensor | None:
    """Return the places of the labels that count among all; ``None`` if all do.

    They are int64 on ``device``. Labels on a GPU are waited for.
    """
    counts = labels.reshape(-1) != IGNORE_INDEX
    if counts.all():
        return None
    places = counts.nonzero().squeeze(1)
    if device.type == "cuda" and places.device.type == "cpu":
        places = places.pin_memory()
    return places.to(device, non_blocking=True)


def places_of_all(labels: Sequence[Tensor]) -> Tensor | None:
    """Return the places of the labels that count in each micro-batch, in equally many columns.

    A row is filled up with a place whose label does not count. ``None`` if nearly all of some micro-batch's count.

    Args:
        labels: of each micro-batch, all of one shape, on the CPU.

    Returns:
        int64 of shape (micro-batches, places).
    """
    counts = torch.stack([each.reshape(-1) != IGNORE_INDEX for each in labels])
    most = int(counts.sum(dim=1).max())
    if most == counts.shape[1]:
        return None
    # those that count come first, in their order; then others
    return torch.sort(counts, dim=1, descending=True, stable=True).indices[:, : max(most, 1)].contiguous()


PLAIN_HEADS = frozenset(
    {"gpt2", "llama", "mistral", "qwen2", "qwen3", "idefics3", "llava", "qwen2_vl", "smolvlm"},
)
"""Model types whose logits are the output head of the last hidden state: no cap, no scale."""


@contextmanager
def labels_at_head(
    module: nn.Module, labels: Tensor, places: Tensor | None = None, of_sources: TokenSources | None = None
) -> Iterator[None]:
    """In this context, make the output head of ``module`` return the summed loss, if possible.

    The head's own ``forward`` does it, so that whatever gathers its weight around a forward pass (ZeRO-3, FSDP2) does.
    Everything in between hands the scalar on as if it were logits; :func:`loss_of` takes it, and logits all the same.

    Args:
        module: a causal language model of Transformers, a pipeline stage made of one, or what wraps either.
        labels: (sequences, tokens) of the forward pass taken in this context.
        places: of the labels that count; others, as of prompts and padding, then cost nothing.
        of_sources: of all tokens; gets the loss of each too.
    """
    head = plain_head(module)
    if head is None:
        yield
        return
    with replaced_forward(head, lambda hidden: linear_cross_entropy(hidden, head.weight, labels, places, of_sources)):
        yield


@contextmanager
def logits_at_places(module: nn.Module, places: Tensor | None) -> Iterator[None]:
    """In this context, make ``module`` return logits (1, places, vocabulary), if possible.

    Args:
        module: as :func:`labels_at_head` takes it.
        places: of the labels that count; ``None`` changes nothing.
    """
    head = None if places is None else plain_head(module)
    if head is None:
        yield
        return
    linear = type(head).forward

    def forward(hidden: Tensor) -> Tensor:
        chosen: Tensor = linear(head, hidden.flatten(0, -2).index_select(0, places).unsqueeze(0))
        return chosen

    with replaced_forward(head, forward):
        yield


@contextmanager
def replaced_forward(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In this context, let an output head compute something else."""
    assert "forward" not in vars(head), "the head has been replaced already"
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def loss_of(output: Tensor, labels: Tensor, of_sources: TokenSources | None = None) -> Tensor:
    """Return the summed loss, an fp32 scalar, of a model's output in :func:`labels_at_head`."""
    return output if output.ndim == 0 else cross_entropy(output, labels, of_sources)


def plain_head(module: nn.Module) -> nn.Linear | None:
    """Return the output head if logits are just its product with the hidden state, or ``None``."""
    while not isinstance(module, PreTrainedModel):  # DistributedDataParallel, DeepSpeed's engine
        module = module.module
    head = module.get_output_embeddings()
    plain = module.config.model_type in PLAIN_HEADS and type(head) is nn.Linear and head.bias is None
    return head if plain else None


CHUNK_BYTES = 2**27
"""Most bytes of a chunk's fp32 logits: 667 tokens of GPT-2's vocabulary.
Much less, and a product has too few rows to keep a GPU busy; much more, and the chunk is what fills the memory."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    places: Tensor | None = None,
    of_sources: TokenSources | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Return the summed loss of the logits ``hidden @ weight.T``, an fp32 scalar.

    Products are taken in autocast's format where that is on, else in the format of ``weight``.

    Args:
        hidden: (..., width), what the output head takes.
        weight: (vocabulary, width), of the output head.
        labels: (...), ``IGNORED`` where a token does not count.
        places: of the labels that count, by which the others are left out; ``None`` leaves out none.
        of_sources: of all tokens; gets the loss of each too.
        token_weights: factors of the losses of all tokens, fp32 of the shape of ``labels``; ``None`` is 1.
    """
    on = weight.device.type
    dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else weight.dtype
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    factors = None if token_weights is None else token_weights.reshape(-1)
    if places is not None:
        flat, labels = flat.index_select(0, places), labels.index_select(0, places)
        factors = None if factors is None else factors.index_select(0, places)
    with torch.autocast(on, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(
            flat, weight, labels, dtype, None if of_sources is None else of_sources.at(places), factors
        )
    return loss


def cross_entropy(logits: Tensor, labels: Tensor, of_sources: TokenSources | None = None) -> Tensor:
    """Return the loss of given logits, summed over the labelled tokens, as an fp32 scalar.

    Args:
        logits: (..., vocabulary) in any format.
        labels: (...), ``IGNORED`` where a token does not count.
        of_sources: of all tokens; gets the loss of each too.
    """
    loss: Tensor = _CrossEntropy.apply(logits.flatten(0, -2), labels.reshape(-1), of_sources)
    return loss


def row_log_probs(logits: Tensor, labels: Tensor, places: Tensor | None = None) -> Tensor:
    """Return the log-probability of each row's labels together, fp32 of shape (rows,).

    Args:
        logits: (rows, tokens, vocabulary) in any format, or (1, places, vocabulary) from :func:`logits_at_places`.
        labels: (rows, tokens), ``IGNORED`` where a token does not count.
        places: of the labels that count; ``None`` if all do.
    """
    flat, every = logits.flatten(0, -2), labels.reshape(-1)
    if places is None or len(flat) == len(every):
        found: Tensor = _TokenLogProbs.apply(flat, every)
    else:
        counted: Tensor = _TokenLogProbs.apply(flat, every.index_select(0, places))
        found = counted.new_zeros(len(every)).index_copy(0, places, counted)
    return found.view(labels.shape).sum(dim=-1)


def _chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    return (slice(first, first + size) for first in range(0, num_tokens, size))


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)  # converts inside the kernel where there is a GPU


def _loss(
    log_probs: Tensor,
    labels: Tensor,
    tokens: slice,
    of_sources: TokenSources | None,
    factors: Tensor | None = None,
) -> Tensor:
    """Return the summed loss of some tokens, and add it up by sources.

    Args:
        log_probs: of some tokens, (tokens, vocabulary).
        labels: of these.
        tokens: which of all they are.
        of_sources: of all tokens.
        factors: of the losses of all tokens.
    """
    if factors is not None:
        losses = torch.nn.functional.nll_loss(log_probs, labels, ignore_index=IGNORE_INDEX, reduction="none")
        return losses @ factors[tokens]
    if of_sources is not None:
        of_sources.add(tokens, -log_probs.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1), labels)
    return torch.nn.functional.nll_loss(log_probs, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def _gradient_(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Turn log-probabilities in place into the loss's gradient by logits: softmax minus one-hot."""
    counts = (labels != IGNORE_INDEX).unsqueeze(1)
    one_hot_at = labels.unsqueeze(1).clamp(min=0)
    gradient = log_probs.exp_()
    gradient.scatter_add_(1, one_hot_at, gradient.new_full((1, 1), -1.0).expand_as(one_hot_at))
    return gradient.mul_(counts)


class _LinearCrossEntropy(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """Computes gradients in the forward pass, chunk by chunk; backward only scales them.

    So the weight is touched in the forward pass alone, where ZeRO-3 and FSDP2 have gathered it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        of_sources: TokenSources | None,
        factors: Tensor | None,
    ) -> Tensor:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        matrix = weight.detach().to(dtype)
        for chunk in _chunks(len(hidden), len(weight)):
            rows = hidden[chunk].to(dtype)
            log_probs = _log_softmax(rows @ matrix.T)
            loss += _loss(log_probs, labels[chunk], chunk, of_sources, factors)
            if of_hidden or of_weight:
                gradient = _gradient_(log_probs, labels[chunk])
                if factors is not None:
                    gradient *= factors[chunk, None]
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = gradient @ matrix
                if grad_weight is not None:
                    _add_product_(grad_weight, gradient.T, rows)
        ctx.gradients, ctx.weight_dtype = (grad_hidden, grad_weight), weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        assert ctx.gradients is not None, "the gradients were scaled in place: one backward pass only"
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_output)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to the fp32 ``total``, whatever format the product is taken in."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _CrossEntropy(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """Keeps the logits, and computes their gradient in their own format in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, of_sources: TokenSources | None) -> Tensor:
        ctx.save_for_backward(logits, labels)
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        for chunk in _chunks(*logits.shape):
            loss += _loss(_log_softmax(logits[chunk]), labels[chunk], chunk, of_sources)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for chunk in _chunks(*logits.shape):
            gradient[chunk] = _gradient_(_log_softmax(logits[chunk]), labels[chunk]).mul_(grad_output)
        return gradient, None, None


class _TokenLogProbs(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """Log-probability of each label, 0 where it is ignored; keeps the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        found = torch.zeros(len(labels), dtype=torch.float32, device=logits.device)
        for chunk in _chunks(*logits.shape):
            counted = labels[chunk].clamp(min=0).unsqueeze(1)
            log_probs = _log_softmax(logits[chunk]).gather(1, counted).squeeze(1)
            found[chunk] = log_probs * (labels[chunk] != IGNORE_INDEX)
        return found

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for chunk in _chunks(*logits.shape):
            gradient[chunk] = _gradient_(_log_softmax(logits[chunk]), labels[chunk]).mul_(-grad_output[chunk, None])
        return gradient, None
