"""Runs of this folder are forked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunProgram
from tests.forked_runs import launch as launch
from tests.forked_runs import launch_in_background as launch_in_background

CallIsolated = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def call_isolated(run_forked_program: RunProgram) -> CallIsolated:
    """Call ``module:name`` in a process for each mapping of arguments, by ``run_isolated``; return the answers."""
    program = Path(__file__).parent / "programs" / "isolated_calls.py"

    def call(function: str, *calls: Mapping[str, Any], exact_peaks: bool = False) -> list[dict[str, Any]]:
        printed = run_forked_program(program, function, json.dumps(exact_peaks), *map(json.dumps, calls))
        answers: list[dict[str, Any]] = json.loads(printed.splitlines()[-1])
        return answers

    return call
