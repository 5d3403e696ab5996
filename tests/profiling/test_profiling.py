"""``profile=true``: real traces of real steps, in every kind of job."""

from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.benchmarks.registry import execute_benchmark
from launcher.config.compose import compose
from launcher.config.profile import Profile, ProfileWindow, TorchProfile
from launcher.config.run import Benchmark
from launcher.config.snapshot import save_run
from launcher.engines.context import Context
from launcher.errors import ConfigErrors
from launcher.profiling.memory import memory_timeline
from launcher.profiling.profiler import NO_PROFILER, TimedProfiler, WindowProfiler, make_profiler
from launcher.profiling.recording import Recording
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.plan import Host
from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_json
from tests.conftest import RunProgram

PROGRAMS = Path(__file__).parent / "programs"
BOX = Host(name="box", slots=1, cores=4, memory_bytes=16 * 2**30)
ONE_RANK = ("tracker=local", "backend.ranks=1", "parallel=single", "backend.threads=1")
TINY = (
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.max_position_embeddings=64",
    "model.vocab_size=257",
)


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return found


def calls(found: list[dict[str, Any]], name: str) -> int:
    return sum(event.get("name") == name and event.get("ph") == "X" for event in found)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def files_of(*processes: str) -> set[str]:
    endings = ("trace.json.gz", "operators.txt", "operators.md", "memory.json")
    return {f"{process}.{ending}" for process in processes for ending in endings}


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(TorchProfile(top=5, shapes=True), folder=tmp_path / "profile", name="rank0")


def test_just_the_window_is_recorded(recording: Recording, capsys) -> None:
    import torch

    profiler = WindowProfiler(recording, ProfileWindow(wait=2, warmup=1, active=2), what="step")
    kept = []
    for step in range(1, 10):
        with profiler.step(), profiler.mark("forward"):
            kept.append(torch.ones(1000 * step).exp())
        assert recording.folder.exists() == (step >= 5), "written as soon as the window ends"
    assert names(recording.folder) == files_of("rank0")
    found = events(recording.folder / "rank0.trace.json.gz")
    assert (calls(found, "aten::exp"), calls(found, "forward"), calls(found, "step")) == (2, 2, 2)
    output = capsys.readouterr().out
    assert re.fullmatch(
        r"profile: steps 4 to 5 of rank0, \S+ s each, \S+ s with the profiler off: \S+/profile\n", output
    )
    table = (recording.folder / "rank0.operators.md").read_text()
    assert re.search(r"\| aten::exp \| 1 \| [\d.]+ ms \| [\d.]+% .* \| 4000 \|", table), "not listed by shape"
    assert re.search(r"\| aten::exp \| 1 \| [\d.]+ ms \| [\d.]+% .* \| 5000 \|", table)
    assert "\n## Named ranges\n" in table
    memory = read_json(recording.folder / "rank0.memory.json")["cpu"]
    held = {row["operator"]: row["bytes"] for row in memory["held_at_peak"]}
    assert held["aten::exp"] == 4 * (4000 + 5000)
    assert memory["peak_bytes"] >= held["aten::exp"] + 4 * 5000, "ones() of step 5 is there, too"


@pytest.mark.parametrize(
    ("steps", "recorded", "said"),
    [
        (0, None, "took 0 steps and records from number 3 on"),
        (2, None, "took 2 steps"),
        (3, 1, "steps 3 to 3 of rank0"),
    ],
)
def test_work_that_is_over_early_leaves_what_there_is(recording, capsys, steps: int, recorded: int, said: str) -> None:
    import torch

    with WindowProfiler(recording, ProfileWindow(wait=1, warmup=1, active=4), what="step") as profiler:
        for _ in range(steps):
            with profiler.step():
                torch.ones(10).exp()
    assert said in capsys.readouterr().out
    assert recording.folder.exists() == bool(recorded)
    if recorded:
        assert calls(events(recording.folder / "rank0.trace.json.gz"), "aten::exp") == recorded
    with torch.profiler.profile():  # whatever was prepared is off: another one can begin
        torch.ones(1)


def test_a_failure_is_not_hidden_by_a_profile(recording) -> None:
    profiler = WindowProfiler(recording, ProfileWindow(wait=0, warmup=0, active=2), what="step")
    with pytest.raises(ZeroDivisionError), profiler, profiler.step():
        raise ZeroDivisionError
    assert not recording.folder.exists()
    recording.stop()


def test_work_without_steps_is_recorded_until_time_is_up(recording, capsys) -> None:
    import torch

    with TimedProfiler(recording, seconds=0.3):
        while not recording.folder.exists():
            torch.ones(10).exp()
            time.sleep(0.01)
        torch.ones(10).sin()
    found = events(recording.folder / "rank0.trace.json.gz")
    assert calls(found, "aten::exp") > 1
    assert calls(found, "aten::sin") == 0
    assert re.fullmatch(r"profile: [\d.]+ s of rank0: \S+/profile\n", capsys.readouterr().out)


def test_memory_is_listed_by_who_holds_it_at_the_peak() -> None:
    def block(at: float, size: int, address: int, device: int = 0) -> dict[str, Any]:
        where = {"Device Type": device, "Device Id": device - 1}
        return {"name": "[memory]", "ts": at, "pid": 1, "tid": 1, "args": {"Bytes": size, "Addr": address, **where}}

    def operator(name: str, at: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": "cpu_op", "name": name, "ts": at, "dur": dur, "pid": 1, "tid": 1}

    found = memory_timeline(
        [
            *(operator("outer", 0.0, 10.0), operator("inner", 1.0, 2.0), operator("next", 20.0, 5.0)),
            *(block(2.0, 100, 1), block(15.0, 7, 2), block(21.0, 50, 3), block(22.0, -100, 1), block(23.0, 30, 1)),
            *(block(24.0, -999, 77), block(2.5, 8, 5, device=1), block(3.0, 20, 9), block(16.0, -20, 9)),
        ]
    )
    cpu = found["cpu"]
    assert (cpu["peak_bytes"], cpu["peak_at_s"]) == (157, 19e-6)
    held = {row["operator"]: (row["bytes"], row["blocks"]) for row in cpu["held_at_peak"]}
    assert held == {"outer": (100, 1), "next": (50, 1), "outside of operators": (7, 1)}
    assert found["gpu 0"]["held_at_peak"] == [{"operator": "outer", "bytes": 8, "blocks": 1}]
    assert memory_timeline([]) == {}


def test_nothing_happens_without_it(tmp_path) -> None:
    for unit in ("steps", "engine steps", "time", "cases"):
        assert make_profiler(Profile(), unit=unit, folder=tmp_path, name="x") is NO_PROFILER
    assert Context.profiler is NO_PROFILER


def test_every_rank_of_a_training_run_leaves_a_profile_and_the_report_shows_it(launch) -> None:
    small = (
        "data=synthetic",
        "job.sequence_length=32",
        "job.micro_batch=2",
        "job.eval_sequences=4",
        "job.sample_tokens=0",
    )
    words = ("tracker=local", "backend.threads=1", "backend.ranks=2", *TINY, "data.vocab_size=257", *small)
    ended = launch(*words, "job.steps=4", "profile=true").expect(0)
    folder = ended.run_dir / "profile"
    assert names(folder) == files_of("rank0", "rank1")
    assert "steps 3 to 4 of rank0" in ended.stdout
    for rank in (0, 1):
        found = events(folder / f"rank{rank}.trace.json.gz")
        assert [calls(found, name) for name in ("forward", "backward", "optimizer", "data")] == [2, 2, 2, 2]
        assert calls(found, "evaluate") == 1, "it belongs to the last step"
        assert "| aten::addmm |" in (folder / f"rank{rank}.operators.md").read_text()
    launch("report", str(ended.run_dir), cwd=ended.cwd).expect(0)
    page = (ended.run_dir / "report.html").read_text()
    assert "Profile of rank1" in page
    assert "memory of cpu while it was recorded" in page


@pytest.mark.parametrize(
    ("words", "step", "recorded"),
    [
        (("job=generate", "job.tokenizer=bytes", "job.max_tokens=8", "profile.active=3"), "engine step", 3),
        (
            ("job=evaluate", "data=synthetic", "data.vocab_size=257", "job.sequence_length=32", "profile.wait=0"),
            "step",
            2,
        ),
    ],
    ids=["generate", "evaluate"],
)
def test_jobs_that_do_not_learn(launch, words: tuple[str, ...], step: str, recorded: int) -> None:
    ended = launch(*words, *ONE_RANK, *TINY, "precision=fp32", "profile=true").expect(0)
    assert names(ended.run_dir / "profile") == files_of("rank0")
    assert calls(events(ended.run_dir / "profile" / "rank0.trace.json.gz"), step) == recorded


def context_of(tmp_path: Path, *words: str) -> Context:
    run = compose([*ONE_RANK, *TINY, "profile=true", *words]).run
    return Context(run=run, run_dir=RunDir(tmp_path), rank=0, local_rank=0, world_size=1, heartbeat=Heartbeat(None))


def test_a_case_in_a_process_of_its_own_is_taken_once_more(run_forked_program: RunProgram, tmp_path: Path) -> None:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "batch_size": 4,
        "sequence_length": 16,
        "every": 1,
    }
    case = {**sizes, "warmup": 0, "seed": 0, "rank": 0, "keep": str(tmp_path / "gradients")}
    step = ("launcher.benchmarks.activation:encoder_step", "every layer / all", json.dumps(case))
    words = (*ONE_RANK, *TINY, "profile=true", "job=benchmark", "benchmark=activation")
    printed = run_forked_program(PROGRAMS / "profiled_case.py", str(tmp_path), *step, *words)
    assert printed.splitlines()[-1] == "1", "no figure comes from the profiler"
    assert names(tmp_path / "profile") == files_of("every_layer_all")
    found = events(tmp_path / "profile" / "every_layer_all.trace.json.gz")
    assert calls(found, "aten::layer_norm") == 16, "two norms of two layers in two steps, and each once more"


@pytest.mark.parametrize(
    ("words", "cases"),
    [
        (("benchmark=cache", "benchmark.tokenizer=bytes", "benchmark.max_length=40"), ("computed",)),
        (
            ("benchmark=batching", "benchmark.num_prompts=4", "benchmark.input_len=4", "benchmark.output_len=8"),
            ("none", "static"),
        ),
    ],
)
def test_cases_in_the_process_of_a_rank_are_taken_once_more(tmp_path, words, cases) -> None:
    more = ("benchmark.modes=[none,static]",) if len(cases) > 1 else ()
    context = context_of(tmp_path, "job=benchmark", *words, *more, "benchmark.repeats=1", "profile.active=3")
    assert isinstance(context.run.benchmark, Benchmark)
    execute_benchmark(context)
    assert names(tmp_path / "profile") == files_of(*cases)
    for case in cases:
        assert calls(events(tmp_path / "profile" / f"{case}.trace.json.gz"), "engine step") == 3


def test_the_engine_of_a_server(run_forked_program: RunProgram, tmp_path: Path) -> None:
    job = ("job=serve", "job.tokenizer=bytes", "job.warm_up=[[1,4]]", "job.kv_cache_tokens=256", "precision=fp32")
    save_run(compose([*ONE_RANK, *TINY, *job, "profile=true", "profile.active=4"]).run, tmp_path / "run.yaml")
    output = run_forked_program(PROGRAMS / "profiled_engine.py", str(tmp_path))
    assert "profile: engine steps 3 to 6 of engine7" in output
    assert names(tmp_path / "profile") == files_of("engine7")
    found = events(tmp_path / "profile" / "engine7.trace.json.gz")
    assert calls(found, "engine step") == 4, "steps without work, and those of the warm-up, are none"


def test_the_plan_says_what_is_recorded(plan_of) -> None:
    plan = plan_of("profile=true", "profile.active=3")
    assert plan.details["profile"] == "steps 3 to 5 of each process, which are slower because of it"
    assert any(file.startswith("profile/") for file in plan.files)
    assert not plan_of().details
    assert not any(file.startswith("profile/") for file in plan_of().files)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("job.steps=3",),
            r"profile\.wait=1.*: steps 3 to 4 would be recorded, and the run has 3; set profile\.wait=0",
        ),
        (("job.steps=2",), r"set profile\.wait=0 profile\.warmup=0 profile\.active=2"),
        (("profile.active=0",), r"profile\.active=0.*: must be at least 1"),
        (("profile.seconds=0",), r"profile\.seconds=0.*: must be above 0"),
        (("profile.actve=3",), r"profile\.actve.*: no such option; did you mean active"),
        (("job=verify",), "job=verify computes in processes that end after a few steps"),
        (("job=generate", "parallel=single", "job.engine=echo"), "engine=echo computes nothing that torch's profiler"),
    ],
)
def test_what_cannot_be_recorded_is_refused(plan_of, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigErrors, match=message):
        plan_of("profile=true", *words, hosts=[BOX])
