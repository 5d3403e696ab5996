"""``launch benchmark compare``: what is worse, better, or within the spread."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.__main__ import main
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
from launcher.config.benchmark.memory import ActivationBenchmark
from launcher.errors import ConfigError
from launcher.runs.benchmark_comparison import improvement_sign
from launcher.utils.files import write_json
from tests.helpers import launch_verb

run = launch_verb("benchmark")

Samples = dict[str, tuple[float, ...]]
MACHINE = {"date": "today", "processor": "x", "load": "1"}


@pytest.fixture
def results(tmp_path: Path) -> Callable[..., str]:
    """Write a benchmark.json as a run does; return its path."""

    def make(name: str, cases: dict[str, Samples], machine: dict[str, str] = MACHINE, **options: Any) -> str:
        found = BenchmarkResults(
            benchmark=ActivationBenchmark(**options),
            cases=[BenchmarkCase(name=case, samples=samples) for case, samples in cases.items()],
            findings=("it is so",),
            metrics={},
            facts={},
        )
        write_json(tmp_path / f"{name}.json", found.tree(machine))
        return str(tmp_path / f"{name}.json")

    return make


A: Samples = {"step_s": (1.0, 1.1, 1.2), "tokens_per_s": (90.0, 100.0, 110.0), "answered_share": (0.5, 0.5, 0.5)}


def compared(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str]]:
    code = run(["compare", *words, "--json"])
    found = json.loads(capsys.readouterr().out)["differences"]
    return code, {f"{one['case']}/{one['quantity']}": one["verdict"] for one in found}


@pytest.mark.parametrize(
    ("quantity", "values", "words", "verdict"),
    [
        ("step_s", (1.3, 1.4, 1.5), (), "worse"),
        ("step_s", (0.7, 0.8, 0.9), (), "better"),
        ("step_s", (1.1, 1.4, 1.5), (), "within spread"),  # the median before lies within
        ("step_s", (1.19, 1.19, 1.4), (), "within spread"),  # the median after lies within
        ("step_s", (1.3, 1.4, 1.5), ("--threshold", "30%"), "within threshold"),
        ("step_s", (1.3, 1.4, 1.5), ("--threshold=0.27",), "worse"),
        ("tokens_per_s", (70.0, 80.0, 89.0), (), "worse"),
        ("tokens_per_s", (120.0, 130.0, 140.0), (), "better"),
        ("answered_share", (0.1, 0.1, 0.1), (), "changed"),
    ],
)
def test_verdicts(capsys, results, quantity, values, words, verdict) -> None:
    one, other = results("a", {"full": A}), results("b", {"full": {**A, quantity: values}})
    code, found = compared(capsys, one, other, *words)
    assert found.pop(f"full/{quantity}") == verdict
    assert set(found.values()) == {"within spread"}
    assert code == (1 if verdict == "worse" else 0)
    assert main(["benchmark", "compare", one, one]) == 0


def test_units_say_which_way_is_better() -> None:
    names = ("requests_per_s", "read_gb_per_s", "step_s", "stall_ms", "peak_bytes", "perplexity")
    assert [improvement_sign(name) for name in names] == [1, 1, -1, -1, -1, 0]


def test_a_run_agrees_with_another_of_its_kind_or_not(capsys, results) -> None:
    one = results("a", {"full": A})
    near = results("b", {"full": {**A, "step_s": (1.05, 1.15, 1.3)}})
    half = results("c", {"full": {**A, "step_s": (1.1, 1.4, 1.5)}})
    assert run(["compare", one, near, "--agree"]) == 0
    assert "each median lies within the other's range" in capsys.readouterr().out
    assert run(["compare", one, half, "--agree"]) == 1
    assert "1 of 3 lie outside the other's range" in capsys.readouterr().out


def test_what_only_one_side_has_and_what_else_differs_is_reported(capsys, results) -> None:
    one = results("a", {"none": A, "full": A}, num_hidden_layers=4, repeats=3)
    other = results(
        "b",
        {"full": {"step_s": (1.1,)}, "extra": A},
        {**MACHINE, "date": "then", "processor": "y"},
        num_hidden_layers=2,
        repeats=1,
    )
    assert run(["compare", one, other]) == 0
    text = capsys.readouterr().out
    assert "only in A: none, full/tokens_per_s, full/answered_share\n" in text
    assert "only in B: extra\n" in text
    assert "other options: num_hidden_layers 4 → 2\n" in text
    assert "another machine: processor x → y\n" in text
    assert "0 of 1 worse by more than 0.05" in text


def test_runs_are_named_as_everywhere(capsys, make_run, results) -> None:
    for number in (1, 2):
        run_dir = make_run(f"2026010{number}-a", name="activation", status="completed")
        run_dir.benchmark("json").write_text(Path(results("a", {"full": A})).read_text())
    assert compared(capsys, "20260101", "runs/activation/20260102-a")[0] == 0


def test_mistakes(make_run, results, tmp_path) -> None:
    good = results("a", {"full": A})
    other = results("b", {"none": A})
    foreign = json.loads(Path(good).read_text())
    write_json(tmp_path / "c.json", {**foreign, "benchmark": {"kind": "serving"}})
    write_json(tmp_path / "d.json", {"benchmark": {}})
    write_json(tmp_path / "e.json", {**foreign, "cases": {"full": {"step_s": []}}})
    make_run("20260101-a", name="tiny", status="completed")
    for words, said in (
        (("comapre", good, good), "did you mean compare"),
        (("compare", good), "lacks B; write launch benchmark compare A B"),
        (("compare", good, str(tmp_path / "c.json")), "benchmark=activation, the other of benchmark=serving"),
        (("compare", good, other), "no case is in both: full in one, none in the other"),
        (("compare", good, str(tmp_path / "d.json")), "is not a valid benchmark.json"),
        (("compare", good, str(tmp_path / "e.json")), "without a value"),
        (("compare", good, "20260101-a"), "has no benchmark.json"),
        (("compare", good, "nope"), "is not a run directory"),
        (("compare", good, good, "--threshold", "much"), "is not a share"),
        (("compare", good, good, "--threshold=-1%"), "is not a share"),
        (("compare", good, good, "--threshold=5%", "--agree"), "cannot be combined with --agree"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(words)
    assert main(["benchmark", "compare", good, other]) == 2


def test_help(capsys) -> None:
    assert run(["--help"]) == 0
    with pytest.raises(ConfigError, match="lacks compare, A, B; write launch benchmark compare A B"):
        run([])
    assert "launch benchmark compare A B" in capsys.readouterr().out
