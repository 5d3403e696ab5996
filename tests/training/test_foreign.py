"""From which step a run goes on in another program's checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.checkpoint.foreign.tensors import ForeignTensors, add_step
from launcher.errors import EXIT_BAD_INPUT, JobError
from launcher.training.foreign import _step_of


def test_the_step_is_that_of_the_files_else_that_of_the_optimizer() -> None:
    foreign: Any = SimpleNamespace(folder=Path("old"))
    found = ForeignTensors()
    with pytest.raises(JobError, match=r"checkpoint\.resume=old: nothing in it says .*model\.weights=old"):
        _step_of(foreign, found, needed=True)
    with pytest.raises(JobError) as refused:
        _step_of(foreign, found, needed=True)
    assert refused.value.exit_code == EXIT_BAD_INPUT
    assert _step_of(foreign, found, needed=False) == 0  # a run that does not train
    add_step(found.moments, "weight", torch.tensor(7.0), Path("optimizer.bin"))
    assert _step_of(foreign, found, needed=True) == 7
    found.step = 9
    assert _step_of(foreign, found, needed=True) == 9
