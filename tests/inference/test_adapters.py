"""Requests for several adapters share a batch, and each gets what PEFT's model with its adapter alone gives."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from launcher.config.inference import EngineLimits
from launcher.config.quantization import Int4Weight, Int8Weight
from launcher.config.sampling import SamplingParams
from launcher.errors import ConfigError, JobError
from launcher.inference.engine.adapter_loader import load_adapters
from launcher.inference.engine.base import EngineOutput, EngineRequest, GeneratedToken, InvalidRequest
from launcher.inference.engine.paged_engine import PagedEngine, paged_engine_for
from launcher.quantization.codecs import AoCodec, Int4Codec, LayerCodec, Nf4Codec
from tests.inference.models import FAMILIES, VOCABULARY, finish, stock
from tests.inference.peft_adapters import ADAPTERS, save_adapter

BASE = ""


class Adapted:
    """A base model's adapters: their folders, and PEFT's models, by name."""

    def __init__(self, family: str, root: Path) -> None:
        self.models: dict[str, PreTrainedModel] = {BASE: stock(family)}
        self.folders: dict[str, str] = {}
        for seed, (name, settings) in enumerate(ADAPTERS[family].items()):
            self.folders[name] = str(root / name)
            self.models[name] = save_adapter(stock(family), root / name, seed=seed, **settings)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapted]:
    return {family: Adapted(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def engine(
    family: str,
    folders: dict[str, str],
    *,
    kernels: bool = True,
    dtype: torch.dtype = torch.float32,
    model: PreTrainedModel | None = None,
    **limits: object,
) -> PagedEngine:
    base = (copy.deepcopy(stock(family)) if model is None else model).to(dtype)
    adapters = load_adapters(base, folders, name=family)
    limits = {"kv_cache_tokens": 4096, **limits}
    return paged_engine_for(base, limits=EngineLimits(**limits), eos_token_ids=(), kernels=kernels, adapters=adapters)


def request(name: str, adapter: str, prompt: tuple[int, ...], **sampling: object) -> EngineRequest:
    way = {"max_tokens": 10, "ignore_eos": True, "logprobs": 3, **sampling}
    return EngineRequest(id=name, prompt=prompt, sampling=SamplingParams(**way), adapter=adapter)


def generated(outputs: list[EngineOutput]) -> list[GeneratedToken]:
    return [token for output in outputs for token in output.tokens]


def prompts(seed: int, *lengths: int) -> list[tuple[int, ...]]:
    torch.manual_seed(seed)
    return [tuple(torch.randint(VOCABULARY, (length,)).tolist()) for length in lengths]


def alone(model: PreTrainedModel, asked: EngineRequest) -> tuple[list[int], list[float]]:
    """Return the tokens that ``generate`` gives for a request, and their log-probabilities."""
    ids = torch.tensor([asked.prompt])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=asked.sampling.max_tokens,
        do_sample=False,
        num_beams=asked.sampling.num_beams,
        pad_token_id=0,
        eos_token_id=None,
    )
    scores = model(found).logits[0].log_softmax(-1)
    start = ids.shape[1]
    picked = found[0, start:].tolist()
    return picked, [float(scores[start + at - 1, token]) for at, token in enumerate(picked)]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_answer_is_that_of_its_adapter_alone(adapted: dict[str, Adapted], family: str, kernels: bool) -> None:
    own = adapted[family]
    asked = [
        request(f"{name} {length}", name, prompt)
        for name in own.models
        for length, prompt in zip((3, 40, 70), prompts(1, 3, 40, 70), strict=True)
    ]
    found = finish(engine(family, own.folders, kernels=kernels, prefill_chunk_size=37, max_num_seqs=9), asked)
    answers = set()
    for each in asked:
        expected, logprobs = alone(own.models[each.adapter], each)
        got = generated(found[each.id])
        assert [token.id for token in got] == expected, each.id
        assert [token.logprob for token in got] == pytest.approx(logprobs, abs=1e-5 * max(map(abs, logprobs))), each.id
        answers.add(tuple(logprobs))
    assert len(answers) == len(asked)  # each adapter changes what the model says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_kernels_no_bit_depends_on_what_else_is_in_the_batch(
    adapted: dict[str, Adapted], family: str, dtype: torch.dtype
) -> None:
    own = adapted[family]
    asked = [
        request(f"{name} {length}", name, prompt)
        for name in own.models
        for length, prompt in zip((1, 33, 64), prompts(2, 1, 33, 64), strict=True)
    ]

    def served(*together: EngineRequest, folders: dict[str, str], **limits: object) -> dict[str, list[GeneratedToken]]:
        outputs = finish(engine(family, folders, dtype=dtype, **limits), together)
        return {name: generated(found) for name, found in outputs.items()}

    together = served(*asked, folders=own.folders)
    assert served(*asked[::-1], folders=own.folders, prefill_chunk_size=7, max_num_seqs=4) == together
    for each in asked[1::3]:
        folders = {each.adapter: own.folders[each.adapter]} if each.adapter else {}
        assert served(each, folders=folders)[each.id] == together[each.id]


def test_beams_and_preemption_keep_the_adapter(adapted: dict[str, Adapted]) -> None:
    own = adapted["llama"]
    beams = {"num_beams": 2, "logprobs": None}
    asked = [
        request(f"{name} {number}", name, prompt, **(beams if number else {}))
        for name in own.models
        for number, prompt in enumerate(prompts(3, 60, 50))
    ]
    paged = engine("llama", own.folders, kv_cache_tokens=256)
    found = finish(paged, asked)
    assert paged.stats().preemptions_total
    for each in asked:
        assert [token.id for token in generated(found[each.id])] == alone(own.models[each.adapter], each)[0], each.id


def test_prefixes_are_shared_within_an_adapter_only(adapted: dict[str, Adapted]) -> None:
    own = adapted["llama"]
    paged = engine("llama", own.folders)
    (prompt,) = prompts(4, 70)
    cached = {}
    for turn in range(2):
        for name in own.models:
            asked = request(f"{name} {turn}", name, prompt)
            outputs = finish(paged, [asked])[asked.id]
            cached[name, turn] = outputs[0].num_cached_tokens
            assert [token.id for token in generated(outputs)] == alone(own.models[name], asked)[0]
    assert cached == {(name, turn): 64 * turn for name in own.models for turn in range(2)}


class Hooked:
    """A model with quantized layers to whose outputs hooks add an adapter's updates, as PEFT does."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        settings = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        scale = settings["lora_alpha"] / settings["r"]
        for name, layer in model.named_modules():
            down, up = (tensors.get(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
            if down is not None and up is not None:
                layer.register_forward_hook(self._adding(down, scale * up))

    @staticmethod
    def _adding(down: torch.Tensor, up: torch.Tensor):  # type: ignore[no-untyped-def]
        return lambda layer, given, made: (made + (given[0].float() @ down.T @ up.T)).to(made.dtype)


@pytest.mark.parametrize(
    "codec",
    [Int4Codec(Int4Weight(group_size=32)), AoCodec(Int8Weight()), Nf4Codec()],
    ids=["int4", "int8", "nf4"],
)
@pytest.mark.parametrize("kernels", [False, True])
def test_adapters_apply_to_quantized_layers(adapted: dict[str, Adapted], codec: LayerCodec, kernels: bool) -> None:
    folder = adapted["llama"].folders["attention"]

    def quantized() -> PreTrainedModel:
        model = copy.deepcopy(stock("llama"))
        for layer in list(model.modules()):
            for name, child in list(layer.named_children()):
                if isinstance(child, nn.Linear) and child is not model.lm_head:
                    setattr(layer, name, codec.quantize(child))
        return model.requires_grad_(False)

    expected = {BASE: quantized(), "attention": quantized()}
    Hooked(expected["attention"], Path(folder))
    asked = [request(name or "base", name, prompt) for name, prompt in zip(expected, prompts(5, 20, 20), strict=True)]
    found = finish(engine("llama", {"attention": folder}, kernels=kernels, model=quantized()), asked)
    for each in asked:
        assert [token.id for token in generated(found[each.id])] == alone(expected[each.adapter], each)[0]


def test_unknown_adapters_are_refused_and_the_others_are_served(adapted: dict[str, Adapted]) -> None:
    own = adapted["llama"]
    paged = engine("llama", {"mlp": own.folders["mlp"]})
    with pytest.raises(InvalidRequest, match="no adapter 'attention'") as refused:
        paged.add(request("x", "attention", (1, 2)))
    assert refused.value.param == "model"
    asked = request("y", "mlp", (1, 2))
    assert [token.id for token in generated(finish(paged, [asked])["y"])] == alone(own.models["mlp"], asked)[0]


def test_an_adapter_that_overflows_fails_its_own_requests_alone(adapted: dict[str, Adapted], tmp_path: Path) -> None:
    own = adapted["llama"]
    huge = copy_adapter(own.folders["attention"], tmp_path / "huge", lambda tensor: tensor * 1e30)
    paged = engine("llama", {"huge": huge, "mlp": own.folders["mlp"]})
    (prompt,) = prompts(6, 40)
    asked = [request(name or "base", name, prompt) for name in ("huge", "mlp", BASE)]
    found = finish(paged, asked)
    assert found["huge"][-1].finish_reason == "error"
    for each in asked[1:]:
        assert [token.id for token in generated(found[each.id])] == alone(own.models[each.adapter], each)[0]


def copy_adapter(source: str, target: Path, change) -> str:  # type: ignore[no-untyped-def]
    target.mkdir()
    config = (Path(source) / "adapter_config.json").read_text()
    (target / "adapter_config.json").write_text(config)
    tensors = load_file(Path(source) / "adapter_model.safetensors")
    save_file({name: change(tensor) for name, tensor in tensors.items()}, target / "adapter_model.safetensors")
    return str(target)


def test_a_damaged_or_foreign_adapter_is_named_when_it_is_loaded(adapted: dict[str, Adapted], tmp_path: Path) -> None:
    source = adapted["llama"].folders["attention"]
    nan = copy_adapter(source, tmp_path / "nan", lambda tensor: tensor * float("nan"))
    with pytest.raises(JobError, match=r"job\.adapters\.a=.*nan: its update of .*o_proj .* not finite") as ended:
        load_adapters(stock("llama"), {"a": nan}, name="llama")
    assert ended.value.exit_code == 65
    with pytest.raises(ConfigError, match=r"job\.adapters\.a=.* adapts model\.layers\.0\.self_attn.* no such linear"):
        load_adapters(stock("gpt2"), {"a": source}, name="gpt2")
