"""Beam search, beside other requests, is that of ``generate``."""

from __future__ import annotations

import random

import pytest

from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineRequest
from tests.inference.models import FAMILIES, VOCABULARY, alone, engine, finish, tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pages", [8, 64])
def test_beams_are_those_of_generate(family: str, pages: int) -> None:
    rng = random.Random(0)
    requests = []
    expected = {}
    for index in range(12):
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40)))
        beams, max_tokens = rng.choice([1, 2, 3]), rng.randint(1, 20)
        penalty = rng.choice([0.5, 1.0, 2.0]) if beams > 1 else 1.0
        way = SamplingParams(max_tokens=max_tokens, num_beams=beams, length_penalty=penalty)
        requests.append(EngineRequest(id=str(index), prompt=prompt, sampling=way))
        options = {"num_beams": beams, "length_penalty": penalty} if beams > 1 else {}
        expected[str(index)] = alone(family, prompt, max_tokens, **options)
    paged = engine(family, kv_cache_tokens=pages * 32, max_num_seqs=7, prefill_chunk_size=16)
    found = finish(paged, requests)
    assert {name: tokens(updates) for name, updates in found.items()} == expected
    assert paged._scheduler.block_manager.num_used == 0
