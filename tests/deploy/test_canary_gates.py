"""Gates and progress of a canary: what is judged, when, and what follows; all in memory."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.config.deploy.canary import CanaryDeploy, split_weights
from launcher.config.run import Run
from launcher.deploy.canary.gates import Check, check_gates, gates_of
from launcher.deploy.canary.progress import Progress, load_progress, next_progress
from launcher.deploy.prepare import prepare
from launcher.errors import EnvironmentProblem
from tests.deploy.monitoring.rendered import PROMTOOL
from tests.deploy.prometheus_api import Measured
from tests.deploy.proxies import SERVER

CANARY = ("deploy=nginx", "deploy.out=x", "deploy.upstreams=[a:1]", "deploy.canary_upstreams=[b:1]")
STEPS = ("deploy.canary_steps=[10,100]", "deploy.canary_checks=2", "deploy.canary_tokens_per_s=20")
VLLM = ("model=gpt2", "model.weights=pretrained", "job.engine=vllm", "job.vllm_python=/opt/vllm/bin/python")
NEW, OLD = ("new",), ("old",)


@functools.cache
def canary(*words: str) -> tuple[Run, CanaryDeploy]:
    run, _ = prepare((*SERVER, *CANARY, *STEPS, *words))
    assert isinstance(run.deploy, CanaryDeploy)
    return run, run.deploy


def checked(new: Measured, old: Measured, *words: str) -> Check:
    run, options = canary(*words)

    def ask(query: str) -> float | None:
        measured = new if "new" in query else old
        if query.startswith("1 / "):
            return 1 / measured.between_tokens_s if measured.between_tokens_s else None
        return measured.answer(query)

    least = options.canary_min_requests
    return check_gates(run, ask, canary=NEW, baseline=OLD, window_s=60.0, min_requests=least)


CASES = {
    "all pass": (Measured(), Measured(), True, 0),
    "failures": (Measured(failure_share=0.02), Measured(), True, 1),
    "as many failures as allowed": (Measured(failure_share=0.01), Measured(), True, 0),
    "few tokens": (Measured(between_tokens_s=0.1), Measured(between_tokens_s=0.1), True, 1),
    "slower in both": (Measured(ttft_p95_s=2.0, between_tokens_s=0.04), Measured(), True, 2),
    "a baseline that is as slow": (Measured(ttft_p95_s=2.0), Measured(ttft_p95_s=2.0), True, 0),
    "a baseline without requests": (Measured(ttft_p95_s=2.0), Measured(requests_per_s=0.1), True, 0),
    "too few requests": (Measured(requests_per_s=0.3, failure_share=1.0), Measured(), False, 0),
    "no requests": (Measured(None, None, None, None), Measured(), False, 0),
    "only failures": (Measured(failure_share=1.0, ttft_p95_s=None, between_tokens_s=None), Measured(), True, 1),
    "no data of any gate": (Measured(100.0, None, None, None), Measured(), False, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_judged_and_what_fails(case: str) -> None:
    new, old, is_judged, num_failed = CASES[case]
    check = checked(new, old)
    assert (check.is_judged, len(check.failed), check.has_failed) == (is_judged, num_failed, num_failed > 0), check.why


def test_a_failed_gate_says_query_value_and_limit() -> None:
    why = checked(Measured(failure_share=0.25), Measured()).why
    assert "share of failed requests 25 % (at most 1 %), deploy.canary_failure_share=0.01: " in why
    assert "request_failure_total" in why


def progress(**changes: object) -> Progress:
    return replace(Progress(version="v2", percent=10, since=0.0, judged=0.0), **changes)  # type: ignore[arg-type]


def test_the_progress_after_each_check() -> None:
    _, options = canary()
    good, bad = checked(Measured(), Measured()), Check(num_requests=0, min_requests=1, problem="down")
    few = Check(num_requests=3, min_requests=20)
    one = next_progress(progress(), good, options, now=60.0)
    assert (one.percent, one.passed, one.since, one.judged) == (10, 1, 0.0, 60.0)
    two = next_progress(one, good, options, now=120.0)
    assert (two.percent, two.passed, two.since) == (100, 0, 120.0)
    last = next_progress(replace(two, passed=1), good, options, now=240.0)
    assert (last.percent, last.state) == (100, "promoted")
    failed = next_progress(two, bad, options, now=180.0)
    assert (failed.percent, failed.failed, failed.state) == (100, 1, "progressing")
    back = next_progress(failed, bad, options, now=240.0)
    assert (back.percent, back.failed, back.state, back.why) == (0, 2, "rolled_back", "down")
    assert next_progress(one, few, options, now=3600.0) == one
    late = next_progress(one, few, options, now=3661.0)
    assert (late.percent, late.state) == (0, "rolled_back")
    assert "3 requests, and deploy.canary_min_requests=20" in late.why


def test_a_record_of_something_else_counts_as_none() -> None:
    own = progress(failed=1)
    assert load_progress(own.dump(), version="v2") == own
    for text in (None, "", "{", "[]", "3", '{"version": "v2"}', own.dump().replace('"percent": 10', '"percent": "x"')):
        assert load_progress(text, version="v2") is None
    assert load_progress(own.dump(), version="v3") is None


@pytest.mark.parametrize("percent", [0, 1, 5, 33, 50, 99, 100])
@pytest.mark.parametrize("numbers", [(1, 1), (2, 1), (3, 7), (10, 1)])
def test_weights_share_as_asked(percent: int, numbers: tuple[int, int]) -> None:
    num_baseline, num_canary = numbers
    old, new = split_weights(percent, num_baseline=num_baseline, num_canary=num_canary, limit=10_000)
    assert new * num_canary * 100 == percent * (old * num_baseline + new * num_canary)
    assert max(old, new) > 0


@pytest.mark.skipif(PROMTOOL is None, reason="Debian's prometheus is not installed")
def test_promtool_accepts_every_query(tmp_path: Path) -> None:
    rules = []
    for words in ((), VLLM):
        run, _ = canary(*words)
        for gate in gates_of(run, canary=("instance=~`b:1`",), baseline=("instance=~`a:1`",), window="60s"):
            for query in filter(None, (gate.query, gate.baseline_query)):
                assert not words or "launcher:" not in query
                rules.append({"record": f"gate{len(rules)}", "expr": query})
    assert len(rules) == 14
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "gates", "rules": rules}]}))
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_an_answer_nothing_is_judged() -> None:
    run, options = canary()

    def ask(query: str) -> float | None:
        raise EnvironmentProblem("unreachable")

    with pytest.raises(EnvironmentProblem):
        check_gates(run, ask, canary=NEW, baseline=OLD, window_s=60.0, min_requests=20)
    unanswered = Check(num_requests=0, min_requests=20, unanswered="unreachable")
    assert next_progress(progress(), unanswered, options, now=60.0) == progress()
