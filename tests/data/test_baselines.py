"""Baselines against sums done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from launcher.data.dataset import uniform_loss, unigram_loss


def test_uniform_is_the_logarithm_of_the_vocabulary() -> None:
    assert uniform_loss(4096) == pytest.approx(12 * math.log(2))


def test_unigram_counts_the_training_text_with_one_added() -> None:
    train, held_out = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    # counts 3 1 0, plus one: 4 2 1 of 7
    expected = -(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3
    assert unigram_loss(train, held_out, vocab_size=3) == pytest.approx(expected)
