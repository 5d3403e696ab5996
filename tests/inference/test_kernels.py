"""Compiled layers give what stock ones give; models that pages cannot hold are refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, MistralConfig, Qwen2Config

from launcher.config.inference import EngineLimits
from launcher.config.quantization import Int4Weight, Int8Dynamic, Int8Weight
from launcher.config.sampling import SamplingParams
from launcher.engines.kept_zeros import linear_matrices
from launcher.errors import ConfigError
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.block_manager import BLOCK_SIZE
from launcher.inference.engine.kv_cache import AttentionMetadata, KVShapes, PagedCache
from launcher.inference.engine.model_runner import KVSelfTest, ModelRunner
from launcher.inference.engine.paged_engine import paged_engine_for
from launcher.inference.engine.step_plan import Segment, StepPlan
from launcher.inference.kernels.layers import NativeLinear, replace_layers
from launcher.inference.kernels.native import (
    NativeAttention,
    PackedMatrix,
    Scratch,
    is_packable,
    native_library,
    pack_layers,
)
from launcher.inference.kernels.semi_structured import is_supported, replace_by_semi_structured
from launcher.inference.kernels.two_of_four import compress, decompress, is_two_of_four
from launcher.quantization.codecs import AoCodec, Int4Codec
from tests.inference.models import finish, stock

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 13, 100])
@pytest.mark.parametrize("shape", [(16, 32), (97, 50), (3, 7), (1400, 50)])
def test_products_are_those_of_torch(dtype: torch.dtype, rows: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, bias, x = (
        torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[:1], (rows, shape[1]))
    )
    for given in (bias, None):
        found = NativeLinear(PackedMatrix([weight], [given]), dtype, Scratch())(x)
        exact = linear(x.double(), weight.double(), None if given is None else given.double())
        spacing = torch.finfo(dtype).eps * exact.abs() + 1e-5
        assert ((found.double() - exact).abs() <= spacing).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "inner", "group"), [(16, 32, 32), (97, 96, 32), (3, 8, 4), (1400, 64, 16)])
def test_products_of_4_bit_matrices_are_those_of_what_they_stand_for(
    dtype: torch.dtype, out: int, inner: int, group: int
) -> None:
    torch.manual_seed(out)
    stock = torch.nn.Linear(inner, out, bias=out % 2 == 0)
    layer = Int4Codec(Int4Weight(group_size=group)).quantize(stock)
    _check_products(layer, layer.dequantized(torch.float64), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "inner"), [(16, 32), (97, 50), (3, 6), (1400, 64)])
def test_products_of_8_bit_matrices_are_those_of_what_they_stand_for(dtype: torch.dtype, out: int, inner: int) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(out)
    layer = AoCodec(Int8Weight()).quantize(torch.nn.Linear(inner, out, bias=out % 2 == 0).requires_grad_(False))
    weight = layer.weight.data
    _check_products(layer, weight.qdata.double() * weight.scale.double(), dtype)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_rounded_activations_are_those_of_torchao(rows: int) -> None:
    torch.manual_seed(rows)
    layer = AoCodec(Int8Dynamic()).quantize(torch.nn.Linear(64, 97).requires_grad_(False))
    assert is_packable(layer)
    x = torch.randn(rows, 64) * torch.logspace(-3, 3, rows)[:, None]
    x[0, :5] = torch.tensor([2.0, -2.0, 0.0, 1e-9, -1e-9])
    found, expected = NativeLinear(pack_layers([layer]), torch.float32, Scratch())(x), layer(x)
    steps = x.abs().amax(dim=1, keepdim=True) / 127.5
    assert ((found - expected).abs() <= 1e-5 * expected.abs() + 1e-5 * steps).all()
    exact = linear(x, layer.weight.data.dequantize(), layer.bias)
    assert (exact - expected).abs().max() > 1e-3  # it is not simply the product of unrounded ones


def _check_products(layer: torch.nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """The same within the rounding of fp32 sums; in few rows or many, which are computed in two ways, the same bits."""
    assert is_packable(layer)
    kernel = NativeLinear(pack_layers([layer]), dtype, Scratch())
    bias = None if layer.bias is None else layer.bias.double()
    x = torch.randn(100, weight.shape[1]).to(dtype)
    together = kernel(x)
    exact = linear(x.double(), weight, bias)
    sizes = linear(x.double().abs(), weight.abs())
    assert ((together.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6 * sizes + 1e-6).all()
    for count in (1, 2, 6, 7, 13):
        assert torch.equal(torch.cat([kernel(part) for part in x.split(count)]), together), count


def two_of_four(*shape: int) -> torch.Tensor:
    """A random matrix of which two in four consecutive inputs are zero, and in some groups three or all four."""
    matrix = torch.randn(shape)
    groups = matrix.unflatten(1, (-1, 4))
    groups.scatter_(-1, torch.rand(groups.shape).argsort(-1)[..., :2], 0.0)
    groups[:, 0, :3] = 0.0
    groups[:, 1] = 0.0
    return matrix


KERNELS = {"own": None, "AVX2": "gcc -mno-avx512f", "neither": "gcc -mno-avx"}
"""Instructions of the machine's own compilation, and fewer ones."""
ROWS = (1, 2, 3, 4, 5, 9, 30, 101)
"""Four rows pass over a panel at a time, and at most 96 are in a block."""


@pytest.mark.parametrize("kernels", KERNELS)
def test_packed_2_4_matrices_give_the_products_of_dense_ones_bit_for_bit(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if KERNELS[kernels] is not None:
        monkeypatch.setenv("CC", KERNELS[kernels])
        assert native_library().native_panel() <= (16 if kernels == "AVX2" else 8)
    torch.manual_seed(0)
    for out, inner in ((16, 32), (97, 64), (300, 48)):
        weight = two_of_four(out, inner)
        for dtype in (torch.float32, torch.bfloat16):
            bias = torch.randn(out).to(dtype)
            packed, dense = (PackedMatrix([weight.to(dtype)], [bias], sparse=sparse) for sparse in (True, False))
            # 17 bits of 32 in fp32, 9 of 16 in bf16: two of four values, and 4 bits for their places
            assert packed.weight.nbytes * 2 * dtype.itemsize == dense.weight.nbytes * (dtype.itemsize + 0.25)
            _check_same(packed, dense, dtype, inner)
    stacked = [PackedMatrix([weight] * 2, [None] * 2, sparse=sparse) for sparse in (True, False)]
    _check_same(*stacked, torch.float32, 48)


@pytest.mark.parametrize("method", [Int8Weight(), Int8Dynamic()], ids=lambda method: method.kind)
def test_packed_2_4_matrices_of_8_bits_give_the_products_of_dense_ones_bit_for_bit(method: Int8Weight) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 97).requires_grad_(False)
    linear.weight.copy_(two_of_four(97, 64))
    layer = AoCodec(method).quantize(linear)
    packed, dense = pack_layers([layer], sparse=True), pack_layers([layer])
    assert packed.weight.nbytes * 8 == dense.weight.nbytes * 5
    for dtype in (torch.float32, torch.bfloat16):
        _check_same(packed, dense, dtype, 64)


def _check_same(packed: Any, dense: Any, dtype: torch.dtype, inner: int) -> None:
    assert packed.is_sparse
    assert not dense.is_sparse
    for rows in ROWS:
        x = torch.randn(rows, inner).to(dtype)
        found, expected = (NativeLinear(matrix, dtype, Scratch())(x) for matrix in (packed, dense))
        assert torch.equal(found, expected), rows
        assert expected.any()


def test_matrices_are_packed_only_where_nothing_is_lost() -> None:
    matrix = two_of_four(40, 32)
    assert torch.equal(decompress(*compress(matrix)), matrix)
    for wrong in (torch.randn(40, 32), torch.zeros(40, 32), two_of_four(40, 24)):
        assert not is_two_of_four(wrong)
        assert not PackedMatrix([wrong], [None], sparse=True).is_sparse
    assert not PackedMatrix([matrix], [None]).is_sparse
    matrix[39, 28:31] = 1.0  # one group of the last row has three weights
    assert not is_two_of_four(matrix)
    assert not PackedMatrix([matrix], [None], sparse=True).is_sparse


def test_matrices_of_a_gpu_are_replaced_only_where_its_kernels_take_them() -> None:
    def of(shape: tuple[int, int], dtype: torch.dtype) -> torch.nn.Linear:
        layer = torch.nn.Linear(*shape[::-1], dtype=dtype).requires_grad_(False)
        layer.weight.copy_(two_of_four(*shape))
        return layer

    assert is_supported(of((96, 128), torch.bfloat16))
    assert not is_supported(of((96, 128), torch.float32))
    assert not is_supported(of((96, 96), torch.float16))
    assert not is_supported(of((80, 128), torch.float16))
    assert not is_supported(torch.nn.Linear(128, 96, dtype=torch.bfloat16))
    model = torch.nn.Sequential(of((96, 128), torch.bfloat16))
    if not torch.cuda.is_available():
        assert replace_by_semi_structured(model, setattr) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pruned_model_answers_the_same_with_packed_matrices(family: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = copy.deepcopy(stock(family)).bfloat16()
    torch.manual_seed(0)
    for matrix in linear_matrices([model]).values():
        inputs_last = matrix.data if family == "llama" else matrix.data.t()
        inputs_last.copy_(two_of_four(*inputs_last.shape) / 8)
    answers = []
    for sparse in (True, False):
        limits = EngineLimits(kv_cache_tokens=512, sparse_kernels=sparse)
        paged = paged_engine_for(copy.deepcopy(model), limits=limits, eos_token_ids=())
        sampling = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3)
        requests = [EngineRequest(id=str(n), prompt=tuple(range(5, 5 + n)), sampling=sampling) for n in (3, 40)]
        answers.append(
            {name: [update.tokens for update in updates] for name, updates in finish(paged, requests).items()}
        )
    assert answers[0] == answers[1]
    packed, whole = (line for line in capfd.readouterr().out.splitlines() if line.startswith("engine: "))
    assert "8 of 9 matrices are 2:4" in packed
    assert "2:4" not in whole


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_is_that_of_the_stock_model(family: str) -> None:
    exact = KVSelfTest(copy.deepcopy(stock(family)).bfloat16().float())
    half = copy.deepcopy(stock(family)).bfloat16()
    reference = KVSelfTest(half)
    reference.install(half)
    cache = PagedCache(reference.shapes, num_blocks=1, dtype=half.dtype, device=half.device)
    assert "compiled" in replace_layers(half, cache).what
    ours = exact.difference(ModelRunner(half, cache))
    stock_error = (reference._expected - exact._expected).norm(dim=-1) / exact._expected.norm(dim=-1)
    assert 0 < ours < 3 * float(stock_error.median())


def test_a_block_with_other_parts_than_it_seems_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    config = GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, residual_multiplier=0.3)
    paged_engine_for(
        AutoModelForCausalLM.from_config(config).eval(), limits=EngineLimits(kv_cache_tokens=64), eos_token_ids=()
    )
    assert "differ by" in capfd.readouterr().out


def test_biases_of_queries_are_added() -> None:
    config = Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    sample = KVSelfTest(model)
    sample.install(model)
    cache = PagedCache(sample.shapes, num_blocks=1, dtype=model.dtype, device=model.device)
    assert replace_layers(model, cache).what.startswith("2 blocks")
    assert sample.difference(ModelRunner(model, cache)) < 1e-5


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MistralConfig(**SMALL, sliding_window=8), "Sliding"),
        (Gemma2Config(**SMALL, sliding_window=8, layer_types=["full_attention"] * 2), "softcap"),
    ],
    ids=["window", "softcap"],
)
def test_models_that_pages_cannot_hold_are_refused(config: object, why: str) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match=why):
        paged_engine_for(model, limits=EngineLimits(kv_cache_tokens=64), eos_token_ids=())


def test_without_a_compiler_the_stock_layers_run_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    paged_engine_for(copy.deepcopy(stock("llama")), limits=EngineLimits(kv_cache_tokens=64), eos_token_ids=())
    assert "no C compiler (no-such-compiler)" in capfd.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 16), (9, 3, 64), (16, 1, 32), (5, 1, 128)])
def test_attention_over_pages_is_that_of_torch(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    shapes = KVShapes(keys=((kv_heads, dim),), values=((kv_heads, dim),), item_bytes=dtype.itemsize)
    caches = [PagedCache(shapes, num_blocks=120, dtype=dtype, device=torch.device("cpu")) for _ in range(2)]
    caches[0].kernels = NativeAttention(Scratch())
    pages = torch.randperm(120, generator=generator).tolist()
    spans = ((0, 1), (0, 33), (1, 2), (33, 100), (2, 40), (100, 101), (0, 3000))
    sequences = ("a", "b", "a", "b", "a", "b", "c")
    held = {"a": pages[:2], "b": pages[2:6], "c": pages[6:100]}
    for first in range(0, len(spans), 2):  # parts of two sequences at a time, and a last one that is long
        parts = tuple(
            Segment(
                start=start,
                tokens=(1,) * (end - start),
                block_table=tuple(held[name][: -(-end // BLOCK_SIZE)]),
                needs_logits=True,
            )
            for name, (start, end) in list(zip(sequences, spans, strict=True))[first : first + 2]
        )
        plan = StepPlan(parts, padding=2)
        count = sum(len(part.tokens) for part in parts) + 2
        query, key, value = (
            torch.randn((1, number, count, dim), generator=generator).to(dtype)
            for number in (heads, kv_heads, kv_heads)
        )
        found = []
        for cache in caches:
            cache.step = AttentionMetadata(plan, cache, device=torch.device("cpu"))
            cache.update(key, value, 0)
            found.append(cache.step.attend(0, query, key, value, scale=0.3).float()[:, :-2])
        assert torch.allclose(*found, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
