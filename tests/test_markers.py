"""Every test has one marker, and a unit test that starts a process fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MARKERS = {"unit", "process", "cluster", "bench", "gpu"}


def test_every_test_has_exactly_one(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        found = [mark.name for mark in item.iter_markers() if mark.name in MARKERS]
        assert len(found) == 1, (item.nodeid, found)


def test_a_unit_test_may_start_no_process(request: pytest.FixtureRequest) -> None:
    with pytest.raises(AssertionError, match="starts a process: give it another marker"):
        subprocess.run([sys.executable, "-c", ""], check=True)
    with pytest.raises(AssertionError, match="starts a process"):
        os.fork()
    assert request.node.get_closest_marker("unit") is not None
