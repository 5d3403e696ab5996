"""Rows of several documents: no document sees another, and each strategy's losses are those of documents apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM

from launcher.config.attention import EagerAttention, FlashAttention, FlexAttention, SdpaAttention
from launcher.models.attention import attention_implementation
from launcher.models.layers import causal_mask

from .conftest import losses

STEPS = 4
FSDP = {"kind": "fsdp"}
STRATEGIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "eager": ("gpt2", 1, {"kind": "single"}),
    "recomputed": ("llama", 1, {"kind": "single"}),
    "ddp": ("gpt2", 2, {"kind": "ddp"}),
    "fsdp": ("llama", 2, FSDP),
    "hsdp": ("gpt2", 4, {**FSDP, "replicate": 2}),
    "tensor": ("llama", 2, {**FSDP, "tensor": 2}),
    "sequence": ("llama", 2, {**FSDP, "sequence_parallel": 2}),
    "sequence_gpt2": ("gpt2", 2, {**FSDP, "sequence_parallel": 2}),
    "zero1": ("gpt2", 2, {"kind": "zero", "stage": 1}),
    "zero3": ("llama", 2, {"kind": "zero", "stage": 3, "persistence_threshold": 0}),
    "pipeline": ("llama", 2, {"kind": "pipeline", "stages": 2}),
    "pipeline_zbv": ("gpt2", 2, {"kind": "pipeline", "stages": 2, "schedule": "zbv"}),
    "pipeline_interleaved": ("llama", 2, {"kind": "pipeline", "stages": 2, "schedule": "interleaved_1f1b"}),
    "deepspeed_pipeline": ("llama", 2, {"kind": "deepspeed_pipeline", "stages": 2}),
    "deepspeed_pipeline_gpt2": ("gpt2", 2, {"kind": "deepspeed_pipeline", "stages": 2}),
    "deepspeed_pipeline_recomputed": ("llama", 2, {"kind": "deepspeed_pipeline", "stages": 2}),
}
LR = {"gpt2": 3e-3, "llama": 1e-3}


def case(name: str, family: str, world: int, parallel: dict[str, Any], documents: str = "packed") -> dict[str, Any]:
    split = {"pipeline": parallel.get("stages", 1), "deepspeed_pipeline": parallel.get("stages", 1)}
    shared = parallel.get("sequence_parallel", 1) * parallel.get("tensor", 1) * split.get(parallel["kind"], 1)
    job = {"micro_batch": 4, "gradient_accumulation_steps": 4 // (world // shared)}
    run: dict[str, Any] = {"parallel": parallel, "job": job}
    if "eager" in name:
        run["attention"] = {"kind": "eager"}
    if "recomputed" in name:
        run["activation"] = {"kind": "full"}
    shown = {"name": name, "family": family, "world": world, "steps": STEPS, "lr": LR[family]}
    return {**shown, "documents": documents, "held_out": 4, "run": run}


@pytest.fixture(scope="module")
def answers(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("packed")
    single = {"kind": "single"}
    cases = [case(f"apart_{family}", family, 1, single, "apart") for family in LR]
    cases += [case(f"leaking_{family}", family, 1, single, "leaking") for family in LR]
    cases += [case(name, *where) for name, where in STRATEGIES.items()]
    found: dict[str, Any] = run_cases(cases, folder)
    for one in cases:
        parts = [json.loads((folder / f"{one['name']}.{rank}.json").read_text()) for rank in range(one["world"])]
        found[one["name"]]["held_out"] = [sum(numbers) for numbers in zip(*(p["held_out"] for p in parts), strict=True)]
    return found


@pytest.mark.parametrize("name", STRATEGIES)
def test_packed_rows_train_as_documents_apart_do(answers: dict[str, Any], name: str) -> None:
    """fp32: the first loss differs by rounding alone, later ones by what steps make of it (as in test_parity)."""
    ours, expected = answers[name], answers[f"apart_{STRATEGIES[name][0]}"]
    assert losses(ours)[0] == pytest.approx(losses(expected)[0], rel=1e-6)
    assert losses(ours) == pytest.approx(losses(expected), rel=1e-5)
    assert [step["tokens"] for step in ours["steps"]] == [step["tokens"] for step in expected["steps"]]
    for mine, other in zip(ours["steps"], expected["steps"], strict=True):
        if mine["grad_norm"] is not None:
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_packed_rows_are_evaluated_as_documents_apart_are(answers: dict[str, Any], name: str) -> None:
    (loss, tokens), (expected, counted) = (
        answers[name]["held_out"],
        answers[f"apart_{STRATEGIES[name][0]}"]["held_out"],
    )
    assert loss / tokens == pytest.approx(expected / counted, rel=1e-6)


@pytest.mark.parametrize("family", LR)
def test_rows_without_positions_leak(answers: dict[str, Any], family: str) -> None:
    """The check above sees a document that attends to the one before it."""
    leaking, expected = answers[f"leaking_{family}"], answers[f"apart_{family}"]
    assert losses(leaking)[0] != pytest.approx(losses(expected)[0], rel=1e-5)
    assert leaking["steps"][0]["tokens"] == expected["steps"][0]["tokens"]


def packed_positions(*rows: tuple[int, ...]) -> torch.Tensor:
    """Return the positions of rows given as lengths of their documents."""
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])


@pytest.mark.parametrize("attention", [EagerAttention(), SdpaAttention(), FlashAttention()], ids=lambda a: a.kind)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_another_document_changes_no_logit(weights: dict[str, str], family: str, attention: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(weights[family], dtype=torch.float32).eval()
    model.set_attn_implementation(attention_implementation(type(model), attention))
    positions = packed_positions((1, 10, 5), (16,), (7, 1, 8))
    ids = torch.randint(0, 256, positions.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for row, (start, end) in {0: (1, 11), 2: (0, 7)}.items():
            changed = ids.clone()
            changed[row, start:end] = (ids[row, start:end] + 1) % 256
            after = model(input_ids=changed, position_ids=positions, use_cache=False).logits
            same = torch.ones(3, 16, dtype=torch.bool)
            same[row, start:end] = False
            assert torch.equal(after[same], before[same])
            assert not torch.equal(after[~same], before[~same])


def test_flex_attention_masks_other_documents(weights: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask function is SDPA's mask; the kernel itself trains on GPUs only."""

    def uncompiled(_compile: bool = True, **options: Any) -> Any:
        return create_block_mask(**options)

    monkeypatch.setattr("transformers.masking_utils.create_block_mask", uncompiled)
    model = AutoModelForCausalLM.from_pretrained(weights["llama"])
    positions, hidden = packed_positions((1, 10, 5), (16,)), torch.zeros(2, 16, 64)
    masks = {}
    for attention in (SdpaAttention(), FlexAttention()):
        model.set_attn_implementation(attention_implementation(type(model), attention))
        masks[attention.kind] = causal_mask(model.config, hidden, positions)
    at = torch.arange(16)
    flex = masks["flex"].mask_mod
    found = torch.stack([torch.stack([flex(row, 0, query, at) for query in at]) for row in torch.arange(2)])
    assert torch.equal(found[:, None], masks["sdpa"])
    assert not found[0, 5, 0]
    assert found[1, 5, 0]
