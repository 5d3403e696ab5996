"""Runs of this folder are forked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Background, running_in_background, start_interpreter
from tests.forked_runs import launch as launch
from tests.forked_runs import launch_in_background as launch_in_background


@pytest.fixture
def launch_interpreter_in_background(tmp_path: Path) -> Iterator[Callable[..., Background]]:
    """Start the program in the folder of the test without a fork: its ranks take time to load."""
    with running_in_background(tmp_path, start_interpreter) as start:
        yield start
