"""Row 4 of the article: the same gradients from less memory, measured by the real command on a tiny encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import ConfigErrors
from tests.benchmarks.conftest import CallIsolated

TINY = (
    "+exp=checkpointed_encoder",
    "tracker=local",
    "benchmark.num_hidden_layers=4",
    "benchmark.hidden_size=32",
    "benchmark.num_attention_heads=2",
    "benchmark.intermediate_size=128",
    "benchmark.batch_size=64",
    "benchmark.sequence_length=64",
)


def results(run_dir: Path) -> dict:
    return json.loads((run_dir / "benchmark.json").read_text())


@pytest.fixture(scope="module")
def steps(tmp_path_factory, call_isolated: CallIsolated) -> dict[int, dict]:
    """Take a step with none, every 2nd and every layer recomputed; return what each process found."""
    folder = tmp_path_factory.mktemp("gradients")
    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "batch_size": 64,
        "sequence_length": 128,
    }
    sizes |= {"warmup": 0, "seed": 3, "rank": 0}
    cases = {every: {**sizes, "every": every, "keep": str(folder / f"{every}")} for every in (0, 2, 1)}
    found = call_isolated("launcher.benchmarks.activation:encoder_step", *cases.values(), exact_peaks=True)
    return {every: {**found, "file": cases[every]["keep"]} for every, found in zip(cases, found, strict=True)}


def test_recomputing_takes_less_memory_and_changes_no_bit_of_a_gradient(steps) -> None:
    assert len({step["weights"] for step in steps.values()}) == 1
    assert len({step["inputs"] for step in steps.values()}) == 1
    assert len({step["gradients"] for step in steps.values()}) == 1
    assert steps[0]["peak_bytes"] > 1.2 * steps[2]["peak_bytes"] > 1.4 * steps[1]["peak_bytes"]


def test_files_of_gradients_are_compared_by_tensor_and_bit(steps, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    from launcher.benchmarks.activation import compare_gradients

    same = compare_gradients(one=steps[0]["file"], other=steps[1]["file"], progress=lambda: None)
    assert same == {"tensors": 48, "equal_tensors": 48, "largest_difference": 0.0}
    gradients = load_file(steps[0]["file"])
    gradients["layers.2.linear1.bias"][5] += 0.25
    gradients["layers.3.norm2.bias"][0] = -gradients["layers.3.norm2.bias"][0]
    save_file(gradients, tmp_path / "other")
    other = compare_gradients(one=steps[0]["file"], other=str(tmp_path / "other"), progress=lambda: None)
    assert (other["tensors"], other["equal_tensors"]) == (48, 46)
    assert other["largest_difference"] == pytest.approx(0.25, abs=1e-6)


def test_the_command_leaves_figures_table_picture_and_metrics(launch) -> None:
    ended = launch(*TINY, "benchmark.repeats=2", "benchmark.warmup=1").expect(0)
    found = results(ended.run_dir)
    assert list(found["cases"]) == ["none", "every_2", "full"]
    assert all(len(case["step_s"]) == len(case["peak_bytes"]) == 2 for case in found["cases"].values())
    for name in ("every_2", "full"):
        assert found["facts"][name]["largest_difference"] == 0.0
        assert found["facts"][name]["equal_tensors"] == found["facts"][name]["tensors"] == 48
        assert found["facts"][name]["gradients"] == found["facts"]["none"]["gradients"]
    assert found["machine"]["versions"].startswith("Python ")
    table = (ended.run_dir / "benchmark.md").read_text()
    for line in ("GB above the level before the step", "memory saved (every_2): ", "time added (every_2): "):
        assert line in table
    assert "largest difference (every_2): 0.000e+00, 48 of 48 gradient tensors equal bit for bit" in table
    assert "weights and inputs: the same in every process" in table
    assert (ended.run_dir / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((ended.run_dir / "result.json").read_text())["metrics"]
    assert metrics["benchmark/full/memory_saved"] == found["metrics"]["full/memory_saved"]
    assert metrics["benchmark/none/peak_bytes"] == found["cases"]["none"]["peak_bytes"][-1]
    assert metrics["train/step"] == 6
    assert list(ended.run_dir.glob("gradients-*")) == []


def test_a_case_that_fails_ends_the_run_and_is_named(launch) -> None:
    ended = launch(*TINY, "benchmark.sequence_length=100000000", "benchmark.repeats=1").expect(1)
    failure = json.loads((ended.run_dir / "failure.json").read_text())
    assert "launcher.benchmarks.activation:encoder_step failed: RuntimeError" in failure["error"]
    assert "tried to allocate" in failure["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("job=benchmark", "parallel=single"), "benchmark=none.*: .*set benchmark=activation"),
        ((*TINY, "backend.ranks=2", "parallel=ddp"), "backend.ranks=2: .*measures on 1 of the 2 ranks"),
        (
            (*TINY, "benchmark.num_attention_heads=7"),
            r"benchmark\.num_attention_heads=7.*: 7 heads do not divide hidden_size=32; set .*_heads=4",
        ),
        ((*TINY, "benchmark.every=1"), r"benchmark\.every=1.*: must be at least 2"),
        ((*TINY, "benchmark.repeats=0"), r"benchmark\.repeats=0.*: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(plan_of, words, message) -> None:
    from tests.conftest import BOX

    ranks = 2 if "backend.ranks=2" in words else 1
    with pytest.raises(ConfigErrors, match=message):
        plan_of(*words, hosts=[BOX.__class__(name="box", slots=ranks, cores=4)])


def test_the_plan_shows_what_is_measured_and_nothing_that_is_not(plan_of) -> None:
    from launcher.planning.render import render_plan
    from launcher.protocol.plan import Host

    text = render_plan(plan_of(*TINY, hosts=[Host(name="box", slots=1, cores=4)]))
    assert "benchmark   activation repeats=3 num_hidden_layers=4 hidden_size=32" in text
    assert "benchmark.json" in text
    for word in ("gpt2", "sequences", "Model state", "optimizer", "loss.png", "checkpoints/"):
        assert word not in text
