"""gpu_check without a GPU: what it says, and its parts on a CPU with a tiny model."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, RunProgram

SCRIPT = REPOSITORY / "scripts" / "gpu_check"
BENCH = REPOSITORY / "scripts" / "bench"


def gpu_check(*words: str, timeout: float = 500, **env: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run([SCRIPT, *words], env=own, capture_output=True, text=True, timeout=timeout)


def test_it_says_that_there_is_no_gpu_in_one_line() -> None:
    if Path("/proc/driver/nvidia/gpus").is_dir():
        pytest.skip("this machine has a GPU")
    ended = gpu_check()
    assert ended.returncode == 2
    assert ended.stderr == "gpu_check: there is no NVIDIA GPU on this machine\n"
    assert ended.stdout == ""


def test_help_tells_what_is_measured() -> None:
    assert "tokens/s and MFU of training on one GPU by strategy" in gpu_check("--help").stdout


def test_rows_and_numbers_that_make_no_sense_are_refused() -> None:
    ended = gpu_check("--only", "launcher", "warp drive")
    assert ended.returncode == 2
    assert "no such row: warp drive" in ended.stderr
    ended = gpu_check("--steps", "4")
    assert ended.returncode == 2
    assert "--skip 6 must lie between 0 and --steps 4" in ended.stderr


def test_launcher_and_peers_are_measured_in_turn_on_a_tiny_model(
    run_forked_program: RunProgram, tmp_path: Path
) -> None:
    words = ("--device", "cpu", "--model", "tiny", "--steps", "3", "--skip", "1", "--rounds", "1")
    rows = ("launcher", "bare torch loop", "HF Trainer")
    words = (*words, "--only", *rows, "--out", str(tmp_path / "report.md"))
    run_forked_program(BENCH / "gpu.py", *words, CUDA_VISIBLE_DEVICES="")
    report = (tmp_path / "report.md").read_text()
    table = [line.split("|")[1:-1] for line in report.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in table] == list(rows)
    for row in table:
        assert float(row[1].split()[0].replace(",", "")) > 0, row
        assert float(row[5]) == pytest.approx(6.25, abs=0.3), "the loss of random weights on 512 tokens"
    assert "losses by number format: fp32 6." in report
    assert "a world of one: gloo: all_reduce, all_gather and broadcast give back what went in" in report


def test_a_row_that_fails_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    sys.path.insert(0, str(BENCH))
    from gpu import MODELS
    from gpu_rows import Row, measure, table

    rows = {"broken": Row(overrides=("model.dropout=2",)), "unknown": Row(overrides=("attention=warp",))}
    found = measure(rows, MODELS["tiny"], rounds=1, skip=1, folder=tmp_path, until=math.inf)
    assert "model.dropout=2" in found["broken"].trouble
    assert found["unknown"].trouble == "this version has no attention=warp"
    text = "\n".join(table(found, MODELS["tiny"], device_name="NVIDIA H100"))
    assert "| unknown | this version has no attention=warp |" in text


def test_build_memory_prints_the_bound_beside_every_strategy(run_forked_program: RunProgram) -> None:
    words = ("naive", "fsdp", "--ranks", "2", "--model", "gpt2_tiny")
    printed = run_forked_program(BENCH / "build_memory.py", *words)
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [("naive", "1"), ("fsdp", "2")]
