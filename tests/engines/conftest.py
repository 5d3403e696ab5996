"""Real ranks for engine tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Start, Started
from tests.ports import free_port

Case = dict[str, Any]
Answer = dict[str, Any]
RunCases = Callable[[Sequence[Case], Path], dict[str, Answer]]

_WORKER = Path(__file__).with_name("worker.py")
_LIMIT_S = 580.0


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a folder for each family with the random weights that every strategy starts from."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    folders = {family: str(tmp_path_factory.mktemp(family)) for family in ("gpt2", "llama")}
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 64, "n_positions": 32, "vocab_size": 256}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folders["gpt2"])
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    sizes |= {"intermediate_size": 128, "max_position_embeddings": 32, "vocab_size": 256, "eos_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained(folders["llama"])
    return folders


@pytest.fixture(scope="session")
def run_cases(weights: dict[str, str], preloading: Start) -> RunCases:
    """Run cases one after the other on rank processes; return rank 0's answers by name."""

    def run(cases: Sequence[Case], folder: Path) -> dict[str, Answer]:
        with_ports = [{**case, "port": free_port()} for case in cases]
        given = folder / "cases.json"
        given.write_text(json.dumps({"weights": weights, "cases": with_ports}))
        shared = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, str(_WORKER), str(given), str(folder)]
        kinds = {case["run"]["parallel"]["kind"] for case in cases}
        kind = "deepspeed" if kinds & {"zero", "deepspeed_pipeline"} else "torch"
        with (folder / "log").open("w") as output:
            env = {**os.environ, **shared}
            ranks = preloading(command, kind=kind, cwd=folder, env=env, stdout=output, stderr=output)
        code = _wait(ranks)
        printed = "\n".join(path.read_text() for path in sorted(folder.glob("log*")))
        assert code == 0, printed
        left = [path for case in with_ports for path in Path("/dev/shm").glob(f"*_{case['port']}_*")]
        assert not left, "shared memory outlives its run"
        return {case["name"]: json.loads((folder / f"{case['name']}.0.json").read_text()) for case in cases}

    return run


def losses(answer: Answer, steps: str = "steps") -> list[float]:
    """Return the loss of each step that a case took."""
    return [step["loss"] for step in answer[steps]]


def _wait(ranks: Started) -> int | str:
    """Return the exit code; once time is up, or when the tests are interrupted, end all of them."""
    try:
        return ranks.wait(_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"not done in {_LIMIT_S} s"
    finally:
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
            ranks.wait()
