"""What every tracker keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config.run import Run
from launcher.planning.planner import LocalFacts, make_plan
from launcher.protocol.plan import Host, Plan, RunIdentity, plan_from_json
from launcher.protocol.rundir import RunDir
from launcher.testing.base import PartContract
from launcher.trackers.sidecar import open_run
from launcher.utils.schema import to_tree

LINES: tuple[dict[str, Any], ...] = (
    {"train/step": 0, "baseline/uniform": 6.2, "time": 1.0},
    {"train/step": 1, "train/loss": 6.0, "train/grad_norm": None, "time": 2.0},
    {"train/step": 1, "eval/loss": 6.1, "time": 3.0},
)
"""Lines of a metrics.jsonl: a step has several, and null is a number that was not finite."""

SAMPLES: tuple[dict[str, Any], ...] = (
    {"train/step": 1, "prompt": "The", "text": "The end", "time": 3.5},
    {"train/step": 1, "prompt": "Ω", "text": "Ω\nand *more*", "time": 3.6},
)
"""Lines of a samples.jsonl."""


class TrackerContract(PartContract):
    """Checks of one tracker."""

    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> RunDir:
        """Return the folder of a run that has recorded ``LINES``."""
        found = RunDir(tmp_path / "run")
        found.path.mkdir()
        found.metrics.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
        return found

    @pytest.fixture
    def plan(self, configured: Run, run_dir: RunDir, tmp_path: Path) -> Plan:
        """Return the plan of a run, made by a user without credentials."""
        hosts = (Host(name="box", slots=1, cores=4, memory_bytes=16 * 2**30),)
        identity = RunIdentity(run_id="20260101-120000-abcd", run_dir=str(run_dir.path), run_hash="ab" * 32, port=29500)
        facts = LocalFacts(environ={}, home=tmp_path, ops_folder="/ops", missing_ops=())
        return make_plan(configured, hosts, identity, facts)

    @pytest.fixture
    def tracker(self, configured: Run, run_dir: RunDir, plan: Plan) -> Any:
        """Return the tracker, as the process beside rank 0 makes it."""
        return open_run(run_dir, configured, plan)

    def test_the_plan_names_it(self, configured: Run, plan: Plan) -> None:
        """Kind, mode and reason are plain data."""
        found = plan.tracker
        assert found.kind == configured.tracker.kind
        assert found.mode in ("online", "offline", "disabled")
        assert found.reason
        assert plan_from_json(to_tree(plan)) == plan

    @pytest.mark.parametrize("exit_code", [0, 1])
    def test_it_takes_every_line_and_the_end(self, tracker: Any, exit_code: int) -> None:
        """A line has numbers, null, and any names."""
        for line in LINES:
            tracker.log(line)
        tracker.flush()
        tracker.finish(exit_code)

    def test_it_takes_generated_texts(self, tracker: Any) -> None:
        """Each has a step, a prompt and a text; trackers without a place for them pass them over."""
        tracker.log_samples(SAMPLES, everything=SAMPLES)
        tracker.flush()
        tracker.finish(0)
