"""The contracts that plugins inherit, kept by the launcher's own parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.registry import KINDS
from launcher.testing.data import CorpusContract
from launcher.testing.model import ModelContract
from launcher.testing.optimizer import OptimizerContract, ScheduleContract
from launcher.testing.training import LossContract

TEXT = "".join(f"Line {number} of the text has several words.\n" for number in range(400))


@pytest.mark.parametrize("words", [(f"optimizer={kind}",) for kind in KINDS["optimizer"]])
class TestOptimizers(OptimizerContract):
    pass


@pytest.mark.parametrize("words", [(f"schedule={kind}", "schedule.warmup_steps=5") for kind in ("cosine", "linear")])
class TestSchedules(ScheduleContract):
    pass


class TestCrossEntropy(LossContract):
    name = "cross_entropy"

    @pytest.fixture
    def loss(self) -> Callable[..., Any]:
        from launcher.engines.loss import cross_entropy  # with Transformers, which takes seconds

        return cross_entropy


@pytest.mark.parametrize("words", [("model=gpt2_tiny",), ("model=llama_tiny",)])
class TestModels(ModelContract):
    pass


class TestText(CorpusContract):
    @pytest.fixture
    def words(self, tmp_path: Path) -> tuple[str, ...]:
        (tmp_path / "text.txt").write_text(TEXT)
        return ("data=text", f"data.path={tmp_path / 'text.txt'}", "data.vocab_size=280")
