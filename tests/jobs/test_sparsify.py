"""The job ``sparsify`` as a real run, what other jobs and Transformers make of its folder, and int8 on top."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import sparsity_reference
import torch
from safetensors.torch import load_file
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as packed_2_of_4
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as unpacked_2_of_4
from transformers import AutoModelForCausalLM

from launcher.utils.files import read_json

WORDS = ("parallel=single", "backend.ranks=1", "backend.threads=1", "tracker=local")


def test_what_is_saved_is_what_others_load_and_int8_keeps_its_zeros(launch, tmp_path: Path) -> None:
    launch("+exp=sparsify_tiny", *WORDS, "run.dir=made").expect(0)
    report = read_json(tmp_path / "made" / "sparsify.json")
    assert len(report["matrices"]) == 4 * 4
    assert report["zeros"]["after"] == 0.5
    assert report["bitmask_bytes"] == report["dense_bytes"] * (0.5 + 1 / 32)
    kept = report["fidelity"]
    assert kept["perplexity_after"] != kept["perplexity_before"]
    assert 0 < kept["divergence"] < 1
    page = (tmp_path / "made" / "sparsify.md").read_text()
    for row in (
        "zeros in these matrices | 0.00% | 50.00%",
        "`transformer.h.*.mlp.c_fc` | 4 | 50.00%",
        "decode, 1 at a",
    ):
        assert f"| {row}" in page

    folder = tmp_path / "made" / "model"
    manifest = read_json(folder / "sparsity.json")
    assert (manifest["kind"], manifest["pattern"], len(manifest["layers"])) == ("sparsegpt", "2:4", 16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    zeros = {}
    for name in manifest["layers"]:
        weight = model.get_submodule(name).weight.detach().t()
        zeros[name] = weight == 0
        assert (zeros[name].view(len(weight), -1, 4).sum(dim=-1) == 2).all(), "two of four inputs of every output"
        half = weight.bfloat16().contiguous()  # as GPUs take them: packing drops what is not 2:4
        assert torch.equal(unpacked_2_of_4(*packed_2_of_4(half)), half)

    with torch.no_grad():
        both = sparsity_reference.compare(tmp_path / "made")
    assert both["launcher"] == kept["perplexity_after"]
    assert both["launcher"] == pytest.approx(both["float64"], rel=1e-3)  # a zero or two of 786,432 may differ

    small = ("model=gpt2_tiny", f"model.weights={folder}", "job.sequence_length=32", "job.eval_sequences=16")
    launch("job=evaluate", *small, *WORDS, "run.dir=evaluated").expect(0)
    loss = read_json(tmp_path / "evaluated" / "result.json")["metrics"]["eval/loss"]
    assert math.exp(loss) == pytest.approx(kept["perplexity_after"], rel=1e-5)  # batches of 8, not of 8 and 8

    quick = ("job.rate_batches=[]", "job.sample_tokens=1", "job.tokenizer=bytes")
    launch("job=quantize", "quantization=int8_weight", *small, *quick, *WORDS, "run.dir=int8").expect(0)
    stored = load_file(tmp_path / "int8" / "model" / "model.safetensors")
    for name, mask in zeros.items():
        values = stored[f"{name}._weight_qdata"]
        assert values.dtype == torch.int8
        assert not values[mask].any(), name
        assert values.count_nonzero() > 0.4 * values.numel()
    warned = launch("job=quantize", "quantization=int4_weight", *small, *quick, *WORDS, "run.dir=int4").expect(0)
    assert "int4_weight does not keep zeros" in warned.output
    assert json.loads((tmp_path / "int8" / "quantize.json").read_text())["layers"] == 16
