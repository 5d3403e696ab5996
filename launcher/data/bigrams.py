"""Sequences of the synthetic data set, each drawn when it is asked for."""

from __future__ import annotations

import hashlib

import numpy as np

from launcher.data.synthetic import Synthetic

_MOST_HELD_OUT = 1024


class Bigrams:
    """Random walks over a table in which every token has ``branching`` equally likely successors.

    Only raw outputs of Philox (Salmon et al., 2011) are used, which numpy keeps stable between versions.
    """

    def __init__(self, data: Synthetic, *, sequence_length: int, seed: int, split: str) -> None:
        self._data, self._length, self._seed, self._split = data, sequence_length, seed, split
        shuffled = np.argsort(self._raw("table", 0, data.vocab_size), kind="stable")
        self._first_successors: list[int] = shuffled.tolist()  # each token once: all are equally common

    @property
    def num_sequences(self) -> int:
        """How many there are before the data repeats."""
        return self._data.num_sequences if self._split == "train" else min(self._data.num_sequences, _MOST_HELD_OUT)

    def sequence(self, index: int) -> np.ndarray:
        """Return sequence ``index`` as int64 of shape (sequence_length + 1,)."""
        vocab_size, firsts = self._data.vocab_size, self._first_successors
        start, *choices = self._raw(self._split, index, self._length + 1).tolist()
        tokens = [start % vocab_size]
        for choice in choices:
            tokens.append((firsts[tokens[-1]] + choice % self._data.branching) % vocab_size)
        walk: np.ndarray = np.array(tokens, np.int64)
        return walk

    def _raw(self, purpose: str, index: int, size: int) -> np.ndarray:
        key = hashlib.blake2b(f"{purpose} {self._seed} {index}".encode(), digest_size=16).digest()
        raw: np.ndarray = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)
        return raw
