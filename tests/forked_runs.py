"""Fixtures ``launch`` and ``launch_in_background`` whose processes are forked from one that has imported torch.

For the conftest.py of folders whose tests check what ranks compute. How processes start is checked without forks by
``test_main_job.py``, one run of each backend's contract and tests of supervision.
"""

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
