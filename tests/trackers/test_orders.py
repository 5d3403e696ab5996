"""A process beside the ranks gets the end of the run, and ends even when a library holds it."""

from __future__ import annotations

import subprocess
import sys

import pytest

FOLLOW = """
import threading
from launcher.trackers.sidecar import RunEndListener as Orders

orders = Orders(finish_s={finish_s}, orphan_s={orphan_s})
orders.start()
while not orders.wait(0.05):
    pass
print(orders.exit_code, flush=True)
{then}
"""
HANG = "threading.Event().wait()"


def follow(given: str, *, finish_s: float = 60, orphan_s: float = 60, then: str = "") -> tuple[int, list[str]]:
    code = FOLLOW.format(finish_s=finish_s, orphan_s=orphan_s, then=then)
    ended = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True, timeout=30)
    return ended.returncode, ended.stdout.splitlines()


@pytest.mark.parametrize(
    ("given", "exit_code"),
    [('{"exit_code": 0}\n', "0"), ('{"exit_code": 137}\n', "137"), ("", "1"), ("nonsense\n", "1"), ("{}\n", "1")],
)
def test_the_exit_code_of_the_run_is_passed_on(given: str, exit_code: str) -> None:
    assert follow(given) == (0, [exit_code])


@pytest.mark.parametrize(("given", "limits"), [('{"exit_code": 0}\n', {"finish_s": 0.1}), ("", {"orphan_s": 0.1})])
def test_a_hang_at_the_end_is_cut_short(given: str, limits: dict[str, float]) -> None:
    code, said = follow(given, **limits, then=HANG)
    assert code == 1
    assert "did not finish in time" in said[-1]
