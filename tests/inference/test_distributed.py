"""A model in slices or stages on several ranks generates what the whole one does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import Start
from tests.ports import free_port

WORKER = Path(__file__).with_name("spread_worker.py")


Serve = Callable[..., str]


@pytest.fixture(scope="module")
def served(preloading: Start, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Return what a model on so many ranks generates; the ranks are forked from a process that has imported torch."""

    @cache
    def serve(world_size: int, *words: str) -> str:
        folder = tmp_path_factory.mktemp("ranks")
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        ranks, logs = [], [folder / str(rank) for rank in range(world_size)]
        for rank, log in enumerate(logs):
            env = {**os.environ, **common, "RANK": str(rank), "WORLD_SIZE": str(world_size)}
            with log.open("wb") as output:
                command = [sys.executable, str(WORKER), *words]
                ranks.append(preloading(command, cwd=folder, env=env, stdout=output, stderr=output))
        codes = [rank.wait(300) for rank in ranks]
        outputs = [log.read_text() for log in logs]
        assert codes == [0] * world_size, outputs
        return next(line for line in outputs[0].splitlines() if line.startswith("found"))

    return serve


@pytest.mark.parametrize(
    ("model", "ranks", "parallel"),
    [
        ("llama_tiny", 2, ("parallel=tensor", "parallel.tensor=2")),
        ("llama_tiny", 2, ("parallel=pipeline",)),
        ("gpt2_tiny", 3, ("parallel=pipeline", "parallel.stages=3")),
    ],
    ids=["slices", "stages", "gpt2"],
)
def test_ranks_with_parts_of_a_model_generate_what_one_with_all_does(
    served: Serve, model: str, ranks: int, parallel: tuple[str, ...]
) -> None:
    assert served(ranks, f"model={model}", *parallel) == served(1, f"model={model}", "parallel=single")
