"""Runs of jobs, forked: how a run starts is what tests of backends and supervision see."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import Background, Launch


@pytest.fixture
def launch(launch_forked: Launch) -> Launch:
    """Run the program in the folder of the test."""
    return launch_forked


@pytest.fixture
def launch_in_background(launch_forked_in_background: Callable[..., Background]) -> Callable[..., Background]:
    """Start the program in the folder of the test."""
    return launch_forked_in_background
