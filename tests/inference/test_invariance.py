"""Under compiled kernels a result is the same bit for bit, in bf16 too, whatever is computed beside it."""

from __future__ import annotations

import copy

import pytest
import torch

from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.paged_engine import paged_engine_for
from tests.inference.models import FAMILIES, VOCABULARY, finish, stock

LENGTHS = (1, 5, 31, 32, 33, 64, 70, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_those_of_the_request_alone(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    requests = [
        EngineRequest(
            id=str(length),
            prompt=tuple(torch.randint(VOCABULARY, (length,)).tolist()),
            sampling=SamplingParams(max_tokens=20, ignore_eos=True, logprobs=3, temperature=length % 2, seed=length),
        )
        for length in LENGTHS
    ]

    def served(together: list[EngineRequest], **limits: object) -> dict[str, list[object]]:
        model = copy.deepcopy(stock(family)).to(dtype)
        paged = paged_engine_for(model, limits=EngineLimits(kv_cache_tokens=2048, **limits), eos_token_ids=())
        return {
            name: [token for update in updates for token in update.tokens]
            for name, updates in finish(paged, together).items()
        }

    alone = {name: found for each in requests for name, found in served([each], enable_prefix_caching=False).items()}
    assert len({str(found) for found in alone.values()}) == len(requests)
    assert served(requests, prefill_chunk_size=7) == alone
    assert served(requests, prefill_chunk_size=256, max_num_seqs=3) == alone
    assert served(requests[::-1], prefill_chunk_size=64, batching="static", max_wait_s=0.0) == alone
