"""The meter itself: what it counts must be what was there."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import torch
from launcher.benchmarks.instruments import PeakMemory
held = [torch.ones({held} * 2**18) for _ in range(2)]   # MiB
gone = torch.ones(64 * 2**18); del gone
peak = PeakMemory(torch.device("cpu"))
first = torch.ones({first} * 2**18); del first
second = torch.ones({second} * 2**18)
print(peak.above_before(), peak.before)
"""


@pytest.mark.parametrize(("first", "second"), [(80, 20), (20, 80), (60, 60)])
def test_the_peak_is_counted_from_the_level_before(first: int, second: int) -> None:
    code = CODE.format(held=40, first=first, second=second)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    above, before = map(int, ended.stdout.split())
    assert max(first, second) * 0.98 < above / 2**20 < max(first, second) * 1.05 + 2
    assert before / 2**20 > 80
