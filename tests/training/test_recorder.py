"""What a training step leaves in metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.config.compose import compose
from launcher.engines.base import StepResult
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.results import read_metrics
from launcher.protocol.rundir import RunDir
from launcher.training.recorder import Recorder


def recorder(tmp_path: Path, *words: str, device: str = "cpu", is_main: bool = True) -> Recorder:
    tmp_path.mkdir(exist_ok=True)
    run: Any = compose(("model=gpt2_tiny", "tracker=local", "job.sequence_length=64", "job.steps=50", *words)).run
    context: Any = SimpleNamespace(
        run=run, run_dir=RunDir(tmp_path), is_main=is_main, world_size=2, heartbeat=Heartbeat(None)
    )
    engine: Any = SimpleNamespace(device=torch.device(device))
    return Recorder(run.job, context, engine, start_step=0, tokens=100)


def result(**options: Any) -> StepResult:
    return StepResult(**{"loss": 2.0, "grad_norm": 0.5, "tokens": 1000, "skipped": False, **options})


def test_the_use_of_the_hardware_is_of_the_peak_that_the_user_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = compose(("model=gpt2_tiny",)).run.model.shape()
    assert shape is not None
    with recorder(tmp_path, "job.peak_tflops=2") as found:
        found.step(1, result(), lr=0.1, elapsed_s=4.0, parts={"forward": 1.0}, padding=0.25)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["perf/mfu"] == pytest.approx(shape.flops_per_token(64) * 250 / 2 / 2e12, rel=1e-9)  # on 2 ranks
    assert (line["data/padding"], line["train/tokens"], line["perf/tokens_per_s"]) == (0.25, 1100, 250)
    assert f"mfu {line['perf/mfu']:.1%}" in capsys.readouterr().out


def test_where_no_peak_is_known_there_is_no_use_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorder(tmp_path) as found:
        found.step(1, result(grad_norm=None), lr=0.1, elapsed_s=4.0, parts={})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert {"perf/mfu", "data/padding", "train/grad_norm"}.isdisjoint(line)
    assert "mfu" not in capsys.readouterr().out


def test_the_peak_of_a_gpu_is_that_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("launcher.training.recorder.peak_memory_bytes", lambda *, cuda: 1.0)
    with recorder(tmp_path, "precision=bf16", device="cuda") as found:
        found.step(1, result(), lr=0.1, elapsed_s=1.0, parts={})
    with recorder(tmp_path / "own", "precision=bf16", "job.peak_tflops=989.4") as own:
        own.step(1, result(), lr=0.1, elapsed_s=1.0, parts={})
    (gpu,), (stated,) = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, tmp_path / "own"))
    assert gpu["perf/mfu"] == pytest.approx(stated["perf/mfu"], rel=1e-3)  # a data sheet says 989 or 989.4


def test_texts_are_recorded_by_the_main_rank_where_some_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = "job.sample_prompts=[a b]"
    for folder, words, is_main in (("none", (), True), ("other", (prompts,), False), ("asked", (prompts,), True)):
        with recorder(tmp_path / folder, "data=text", "data.path=x", *words, is_main=is_main) as found:
            found.samples(3, [("a b", "a b c")])
    assert capsys.readouterr().out == "step 3/50  sample 'a b c'\n"
    assert RunDir(tmp_path / "asked").samples.is_file()
    assert not RunDir(tmp_path / "none").samples.exists()
    assert not RunDir(tmp_path / "other").samples.exists()
