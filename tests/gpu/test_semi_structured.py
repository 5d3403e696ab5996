"""2:4 matrices on a GPU: torch's semi-structured kernels give what dense ones give, and take less memory."""

from __future__ import annotations

import copy

import pytest
import torch

from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.engines.kept_zeros import linear_matrices
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.paged_engine import paged_engine_for
from launcher.inference.kernels.semi_structured import SemiStructuredLinear, replace_by_semi_structured
from tests.inference.models import finish, stock


@pytest.fixture(scope="module", autouse=True)
def ampere() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU of compute capability 8.0 or more")


def pruned_linear(outputs: int, inputs: int, dtype: torch.dtype) -> torch.nn.Linear:
    layer = torch.nn.Linear(inputs, outputs, device="cuda", dtype=dtype).requires_grad_(False)
    groups = layer.weight.unflatten(1, (-1, 4))
    groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0.0)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_those_of_the_dense_matrix(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = pruned_linear(1536, 576, dtype)
    sparse = SemiStructuredLinear(layer)
    for rows in (1, 3, 8, 100):
        x = torch.randn(1, rows, 576, device="cuda", dtype=dtype)
        found, exact = sparse(x).double(), layer.double()(x.double())
        layer.to(dtype)
        # the rounding of the result, and of fp32 sums of 576 products
        assert ((found - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-3).all(), rows


def test_an_engine_replaces_2_4_matrices_and_answers_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    model = copy.deepcopy(stock("llama")).cuda().bfloat16()
    for matrix in linear_matrices([model]).values():
        groups = matrix.data.unflatten(1, (-1, 4))
        groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0.0)
    answers = []
    for sparse in (True, False):
        limits = EngineLimits(kv_cache_tokens=512, sparse_kernels=sparse)
        paged = paged_engine_for(copy.deepcopy(model), limits=limits, eos_token_ids=())
        request = EngineRequest(id="a", prompt=(5, 6, 7), sampling=SamplingParams(max_tokens=4, ignore_eos=True))
        answers.append([token.id for update in finish(paged, [request])["a"] for token in update.tokens])
    assert answers[0] == answers[1]
    first, second = (line for line in capfd.readouterr().out.splitlines() if line.startswith("engine: "))
    assert "14 of them as 2:4 matrices" in first
    assert "2:4" not in second


def test_dense_matrices_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).cuda().bfloat16()
    assert replace_by_semi_structured(model, setattr) == 0
