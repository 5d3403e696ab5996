"""The work of ``job=sparsify`` in this process: what is in memory, and the comparison of a model with itself."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from launcher.benchmarks import sparsify
from launcher.benchmarks.quantize import build_model_of
from launcher.config.compose import compose
from launcher.engines.context import Context
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.rundir import RunDir
from launcher.quantization.layers import matrices
from launcher.sparsity.prune import prune_model

SPARSIFY = (
    *("+exp=sparsify_tiny", "job.eval_sequences=4", "job.rate_batches=[]", "job.sample_tokens=1"),
    *("sparsity.calibration_sequences=4", "sparsity.block_size=128"),
)


def test_one_model_at_a_time_is_in_memory_while_it_is_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's answers are compared all the same: their KL divergence is 0 where nothing differs."""
    built: list[weakref.ref[Any]] = []

    def build(context: Context) -> Any:
        assert [model() for model in built] == [None] * len(built), "an earlier model is still there"
        model = build_model_of(context)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(sparsify, "build_model_of", build)
    found = {}
    for name, prune in {
        "pruned": prune_model,
        "same": lambda model, *_, **__: dict.fromkeys(matrices(model), 0.0),
    }.items():
        (tmp_path / name).mkdir()
        monkeypatch.setattr(sparsify, "prune_model", prune)
        run = compose([*SPARSIFY, f"data.cache={tmp_path / 'cache'}"]).run
        context = Context(
            run=run, run_dir=RunDir(tmp_path / name), rank=0, local_rank=0, world_size=1, heartbeat=Heartbeat(None)
        )
        sparsify.sparsify_model(run.job, context)  # type: ignore[arg-type]
        found[name] = json.loads((tmp_path / name / "sparsify.json").read_text())["fidelity"]
    assert len(built) == 4
    assert found["pruned"]["divergence"] > 1e-4
    assert abs(found["same"]["divergence"]) < 1e-6  # of fp32: the batch of the head is twice as large
    assert found["same"]["agreement"] == 1.0
    assert found["same"]["perplexity_after"] == pytest.approx(found["pruned"]["perplexity_before"], rel=1e-6)
