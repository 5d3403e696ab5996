"""Fine-tuning gives the losses of TRL's SFTTrainer on the same rows, whatever they are and however they are packed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "programs" / "sft_beside_trl.py"


def test_every_step_has_the_loss_of_trl(launch: Any, tmp_path: Path) -> None:
    """Sums are taken in another order, and 5 updates carry that on: 2e-7 of the loss was measured, in fp32."""
    launch(str(tmp_path), command=(sys.executable, str(PROGRAM)), env={"OMP_NUM_THREADS": "1"}).expect(0)
    found = json.loads((tmp_path / "losses.json").read_text())
    assert set(found) == {"turns", "all tokens", "pairs", "plain pairs", "packed", "whole set packed", "adapter"}
    for name, losses in found.items():
        assert len(losses["trl"]) >= 3, name
        assert losses["launcher"] == pytest.approx(losses["trl"], rel=1e-5), name
    ours = {name: losses["launcher"] for name, losses in found.items()}
    assert ours["turns"][0] == ours["adapter"][0]  # matrices B are zero at first
    for name, other in (("turns", "all tokens"), ("pairs", "plain pairs"), ("turns", "packed"), ("turns", "adapter")):
        assert ours[name][-1] != pytest.approx(ours[other][-1], rel=1e-3)
