"""Losses to beat: what a model reaches that has learnt nothing, and one that has learnt only how common tokens are."""

from __future__ import annotations

import math

import numpy as np


def uniform_loss(vocab_size: int) -> float:
    """Return the loss in nats a token of a model that finds every token equally likely."""
    return math.log(vocab_size)


def unigram_loss(train: np.ndarray, held_out: np.ndarray, *, vocab_size: int) -> float:
    """Return the held-out loss in nats a token of the training text's token frequencies, add-one smoothed.

    Args:
        train: token numbers to count.
        held_out: token numbers to predict.
        vocab_size: one more than the largest token number.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1
    log_shares = np.log(counts / counts.sum())
    return float(-log_shares[held_out].mean())
