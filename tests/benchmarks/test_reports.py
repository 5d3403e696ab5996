"""What benchmarks make of figures, in this process: findings, metrics, tables and pictures of known samples."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist

from launcher.benchmarks import attention, collectives, harness, serving
from launcher.benchmarks.activation import compare_gradients, encoder_step
from launcher.benchmarks.attention import AttentionReport
from launcher.benchmarks.harness import CaseRun, profile_cases
from launcher.benchmarks.load_client import HttpResponse, LoadTarget, RequestError
from launcher.benchmarks.memory import memory_report
from launcher.benchmarks.pipeline import pipeline_report
from launcher.benchmarks.pipeline_stages import fold_ranks, order_of
from launcher.benchmarks.quantization_report import AFTER, BEFORE, GROUPS, LAYERS, Fidelity, QuantizationReport
from launcher.config.benchmark.attention import AttentionPoint
from launcher.config.compose import compose
from launcher.config.run import Run
from launcher.engines.context import Context
from launcher.errors import JobError
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.plan import StateBytes
from launcher.protocol.rundir import RunDir

CPU = torch.device("cpu")


def context_of(run: Run, folder: Path) -> Context:
    return Context(run=run, run_dir=RunDir(folder), rank=0, local_rank=0, world_size=1, heartbeat=Heartbeat(None))


def attention_samples(*kernels: str, wrong: str = "") -> tuple[list[AttentionPoint], dict[str, list[dict[str, Any]]]]:
    """Return points at two lengths, at which scores grow as their square and all else as the length."""
    points, samples = [], {}
    for direction in ("forward", "backward"):
        for length in (1000, 2000):
            for kernel in kernels:
                point = AttentionPoint(kernel=kernel, direction=direction, sequence_length=length)  # type: ignore[arg-type]
                growing = length**2 if kernel in ("mha_weights", "eager") else 100 * length
                sample = {"peak_bytes": 1000 * growing, "step_s": 0.5, "weights": "w", "inputs": f"i{kernel == wrong}"}
                sample |= {"output_error": 1e-7, "output_relative": 1e-3 if kernel == wrong else 1e-7}
                if direction == "backward":
                    sample |= {"gradient_error": 2e-7, "gradient_relative": 2e-7}
                points.append(point)
                samples[point.name] = [sample, sample]
    return points, samples


def test_attention_is_compared_with_the_article_and_the_formula(tmp_path: Path) -> None:
    kernels = ("mha_weights", "mha", "eager", "sdpa_flash")
    lengths = "benchmark.sequence_lengths=[1000,2000]"
    words = ("job=benchmark", "benchmark=attention", f"benchmark.kernels=[{','.join(kernels)}]", lengths)
    points, samples = attention_samples(*kernels, wrong="eager")
    benchmark: Any = compose([*words, "benchmark.hidden_size=64"]).run.benchmark
    report = AttentionReport(
        benchmark, points, samples, tolerance=5e-6, value_bytes=4, left_out=["left out: flex: why"]
    )
    results = report.results()
    assert results.metrics["eager/forward/memory_exponent"] == pytest.approx(2)
    assert results.metrics["sdpa_flash/backward/memory_exponent"] == pytest.approx(1)
    assert results.metrics["sdpa_flash/forward/memory_saved"] == pytest.approx(0.95)  # 100 of 2,000 a token
    assert "mha_weights/forward/memory_saved" not in results.metrics, "it is what others are compared with"
    assert results.metrics["eager/forward/largest_relative_error"] == 1e-3
    text = "\n".join(results.findings)
    batch = benchmark.batch_size
    for line in (
        f"peak of nn.MultiheadAttention (forward, sequence 2,000, batch {batch}): 4,000.00 MB",
        f"memory saved (forward and backward, sequence 2,000, batch {batch}): 95.0%",
        f"memory saved by need_weights=False alone (forward, sequence 2,000, batch {batch}): 95.0%",
        "eager, forward: extra memory grows as sequence^2.00 (least squares over 1,000, 2,000; 2.00 between",
        "eager, forward: largest error of output 1.0e-07 (1.0e-03 of the largest value): NOT within rounding",
        "sdpa_flash, forward and backward: largest error of output 1.0e-07 (1.0e-07 of the largest value) "
        "and of the gradient of the input 2.0e-07",
        "weights and inputs: NOT the same",
        "left out: flex: why",
    ):
        assert line in text
    assert not results.facts["eager/forward/1000"]["within_rounding"]
    results.publish(RunDir(tmp_path))
    page = RunDir(tmp_path).benchmark("md").read_text()
    assert "| sequence | 1,000 | 2,000 |" in page
    assert RunDir(tmp_path).benchmark("png").read_bytes().startswith(b"\x89PNG")


def test_attention_without_the_baseline_or_at_one_length_says_no_more_than_it_knows() -> None:
    lengths = "benchmark.sequence_lengths=[1000]"
    words = ("job=benchmark", "benchmark=attention", "benchmark.kernels=[sdpa_flash]", lengths)
    points, samples = attention_samples("sdpa_flash")
    points = [point for point in points if point.sequence_length == 1000]
    benchmark: Any = compose(words).run.benchmark
    results = AttentionReport(benchmark, points, samples, tolerance=5e-6, value_bytes=4, left_out=()).results()
    assert set(results.metrics) == {f"sdpa_flash/{which}/largest_relative_error" for which in ("forward", "backward")}
    assert not results.sweeps
    assert not any("memory" in line or "peak" in line for line in results.findings)
    assert "weights and inputs: the same in every process" in results.findings


def test_attention_that_fits_nowhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = compose(["job=benchmark", "benchmark=attention", "benchmark.kernels=[eager]"]).run
    monkeypatch.setattr(attention, "run_isolated", lambda *_, **__: {"free_bytes": 0, "lacking": {}})
    with pytest.raises(JobError, match=r"^there is nothing to measure; left out: eager/forward/"):
        attention.run_attention_benchmark(run.benchmark, context_of(run, tmp_path))  # type: ignore[arg-type]


def test_recomputing_every_second_layer_changes_no_gradient(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    files = [str(tmp_path / f"{every}.safetensors") for every in (0, 2)]
    calls: list[None] = []
    found = [
        encoder_step(
            **sizes,
            batch_size=2,
            sequence_length=4,
            every=every,
            warmup=0,
            seed=1,
            rank=0,
            keep=file,
            progress=lambda: calls.append(None),
        )
        for every, file in zip((0, 2), files, strict=True)
    ]
    assert calls
    for key in ("weights", "inputs", "gradients"):
        assert found[0][key] == found[1][key]
    same = compare_gradients(one=files[0], other=files[1], progress=lambda: None)
    assert same["equal_tensors"] == same["tensors"] > 0
    assert same["largest_difference"] == 0.0


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let collectives run in a group of this process alone."""

    def connect(context: Context, device: torch.device) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)

    monkeypatch.setattr(collectives, "connect", connect)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


COLLECTIVES = (
    *("job=benchmark", "benchmark=collectives", "benchmark.smallest_bytes=64", "benchmark.largest_bytes=256"),
    *("benchmark.duration_s=0.001", "benchmark.repeats=2", "benchmark.warmup=1"),
)


@pytest.mark.usefixtures("one_rank")
def test_collectives_are_timed_in_turn_and_those_that_a_backend_lacks_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lacking(collectives.COLLECTIVES["all_to_all"]):  # type: ignore[misc,valid-type]
        def call(self) -> None:
            raise RuntimeError(f"gloo {collectives._REFUSALS[0]}\nand a stack")

    monkeypatch.setitem(collectives.COLLECTIVES, "all_to_all", Lacking)
    run = compose([*COLLECTIVES, "benchmark.collectives=[all_reduce,all_to_all,broadcast]"]).run
    results = collectives.run_collectives_benchmark(run.benchmark, context_of(run, tmp_path))  # type: ignore[arg-type]
    names = [case.name for case in results.cases]
    assert names == ["all_reduce/64", "broadcast/64", "all_reduce/256", "broadcast/256"]
    assert [len(case.samples["call_us"]) for case in results.cases] == [2, 2, 2, 2]
    assert set(results.metrics) == {f"{name}/call_us" for name in names} | {
        f"{name}/bus_bandwidth_gb_per_s" for name in ("all_reduce", "broadcast")
    }
    text = "\n".join(results.findings)
    assert f"left out: all_to_all: gloo {collectives._REFUSALS[0]}\nvalues: " in text
    assert "every result was checked on every rank 8 times, and was right" in text
    lines = [json.loads(line) for line in RunDir(tmp_path).metrics.read_text().splitlines()]
    assert len(lines) == 8
    assert not dist.is_initialized()


@pytest.mark.usefixtures("one_rank")
def test_a_wrong_value_or_another_error_of_a_collective_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = compose([*COLLECTIVES, "benchmark.collectives=[broadcast]"]).run
    broadcast = collectives.COLLECTIVES["broadcast"]
    monkeypatch.setattr(broadcast, "num_wrong", lambda self: 3)
    with pytest.raises(JobError, match=r"^broadcast of 64 bytes gives wrong values on rank 0;"):
        collectives.run_collectives_benchmark(run.benchmark, context_of(run, tmp_path))  # type: ignore[arg-type]
    assert "broadcast, 64 bytes: 3 values are wrong on this rank" in capsys.readouterr().out
    dist.destroy_process_group()

    def fail(self: Any) -> None:
        raise RuntimeError("connection reset")

    monkeypatch.setattr(broadcast, "call", fail)
    (tmp_path / "group").unlink(missing_ok=True)
    with pytest.raises(RuntimeError, match="connection reset"):
        collectives.run_collectives_benchmark(run.benchmark, context_of(run, tmp_path))  # type: ignore[arg-type]


def test_bytes_of_ranks_stand_beside_the_formula() -> None:
    run = compose(["job=benchmark", "benchmark=memory", "benchmark.strategies=[ddp]"]).run
    expected = StateBytes(parameters=1000, gradients=1000, optimizer=2000)
    held = {"parameters_bytes": 1000, "gradients_bytes": 500, "optimizer_bytes": 2000, "peak_bytes": 5_000_000}
    answers = [held, {**held, "gradients_bytes": 400}]
    rounds = [CaseRun(answers=answers, numbers={**held})]
    results = memory_report(run.benchmark, run, {"ddp": rounds}, {"ddp": (expected, "4 × P")})  # type: ignore[arg-type]
    assert results.metrics["ddp/gradients_bytes"] == 500, "of the rank that holds most"
    assert results.metrics["ddp/gradients_ratio"] == 0.5
    assert "ddp: gradients are 0.500 times what the formula says" in results.findings
    assert not any("parameters are" in line for line in results.findings), "equal to the formula"
    assert [line for line in results.tables if line.startswith("| ddp | ")] == [
        "| ddp | 0 | 0.001 / 0.001 (1.000) | 0.001 / 0.001 (0.500) | 0.002 / 0.002 (1.000) "
        "| 0.004 / 0.004 (0.875) | 5.0 |",
        "| ddp | 1 | 0.001 / 0.001 (1.000) | 0.000 / 0.001 (0.400) | 0.002 / 0.002 (1.000) "
        "| 0.003 / 0.004 (0.850) | 5.0 |",
    ]
    assert results.facts["ddp"]["formula"] == "4 × P"


def test_pipelines_stand_beside_theory_and_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("job=benchmark", "benchmark=pipeline", "benchmark.micro_batches=[2]", "benchmark.schedules=[gpipe]")
    benchmark: Any = compose([*words, "benchmark.batch_size=4"]).run.benchmark
    found = {}
    for one in benchmark.pipelines:
        answers: list[dict[str, Any]] = [
            {"began_s": 5.0, "ended_s": 7.0, "pass_s": 2.0, "busy_s": 1.5 - rank, "live": 2 - rank, "order": {}}
            for rank in range(one.stages)
        ]
        numbers = fold_ranks(answers, tokens=0 if one.passes == "sleep" else 100 * one.stages)
        found[one.name] = [CaseRun(answers=answers, numbers=numbers)]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    results = pipeline_report(benchmark, found)
    facts = results.facts
    assert facts["sleep_train_gpipe_2_stages_2"]["idle"] == 0.5  # two of the four seconds of two ranks
    assert facts["sleep_train_gpipe_2_stages_2"]["theory"] == 1 / 3
    assert facts["sleep_train_gpipe_2_stages_2"]["live"] == [2, 1]
    assert facts["sleep_infer_2_stages_2"]["live"] is None
    assert facts["model_train_gpipe_2_stages_2"]["speedup"] == 2.0
    assert facts["model_train_one_stage_2"]["idle"] is None
    assert results.metrics["model_infer_2_stages_2/tokens_per_s"] == 100.0
    assert "model_infer_one_stage_2/speedup" not in results.metrics
    text = "\n".join([*results.findings, *results.tables])
    for line in (
        "stages of a known time: idle shares within 16.7 points of theory in all 2 cases; the farthest is ",
        "gpipe, 2 stages, 2 micro-batches: 100 tokens/s, 2.00 times one stage; idle 50.0%",
        "2 stages share 1 cores: they keep each other waiting",
        "| sleep | train | gpipe | 2 | 2 | 33.3% | 50.0% | 2, 1 |  |  |",
        "| model | infer |  | 1 | 2 |  |  |  | 50 |  |",
    ):
        assert line in text
    assert "too few micro-batches" not in text


def test_the_order_of_a_schedule_is_known_where_a_rank_has_several_chunks() -> None:
    action = SimpleNamespace(stage_index=1, computation_type=SimpleNamespace(value="F"), microbatch_index=0)
    several = SimpleNamespace(_stages=[1, 2], pipeline_order={0: [None, action]})
    assert order_of(several) == {0: [(1, "F", 0)]}
    assert order_of(SimpleNamespace()) == {}


def quantization_report(*, forward_after: float, from_files: bool) -> QuantizationReport:
    def rates(after: float) -> dict[int, dict[str, list[dict[str, float]]]]:
        both = {BEFORE: 100.0, AFTER: after}
        return {2: {which: [{"prefill_per_s": 500.0, "decode_per_s": rate}] for which, rate in both.items()}}

    return QuantizationReport(
        model="tiny",
        method=compose(["job=quantize", "quantization=int4_weight"]).run.quantization,  # type: ignore[arg-type]
        precision="fp32",
        layers=3,
        memory={which: dict.fromkeys(GROUPS, size) for which, size in ((BEFORE, 4_000_000), (AFTER, 1_000_000))},
        matrices_bf16=2_000_000,
        disk={AFTER: 1_000_000, **({BEFORE: 4_000_000} if from_files else {})},
        fidelity=Fidelity(tokens=10, perplexity_before=2.0, perplexity_after=2.1, divergence=0.01, agreement=0.9),
        forward=rates(forward_after),
        engine=rates(200.0),
        prompt="Once",
        samples={BEFORE: "a", AFTER: "b"},
    )


@pytest.mark.parametrize(
    ("forward_after", "from_files", "said"),
    [
        (50.0, True, "Slower than before on this machine: decode of 2 by plain"),
        (150.0, False, "Nothing that was measured is slower"),
    ],
)
def test_a_quantized_model_is_shown_beside_its_original(forward_after: float, from_files: bool, said: str) -> None:
    report = quantization_report(forward_after=forward_after, from_files=from_files)
    metrics = report.metrics()
    assert metrics["forward/decode_at_2_before"] == 100.0
    assert metrics["forward/decode_at_2_after"] == forward_after
    assert metrics["share_of_bf16"] == 0.5
    assert LAYERS in GROUPS
    text = "\n".join(report.markdown({"processor": "some"}))
    assert said in text
    assert f"| 100.0 | {forward_after:,.1f} | {forward_after / 100:.2f} |" in text
    assert ("not from files" in text) == (not from_files)
    assert "| perplexity of 10 held-out tokens | 2.000 | 2.100 | 1.0500 |" in text


def test_each_case_is_taken_once_more_under_the_profiler_where_the_run_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Mapping[str, Any], Any]] = []
    monkeypatch.setattr(harness, "run_isolated", lambda _, given, *, heartbeat, profile: asked.append((given, profile)))
    for word in ("profile=false", "profile=true"):
        run = compose(["job=benchmark", "benchmark=data", word]).run
        profile_cases("module:name", {"a/b c": {"size": 1}}, context=context_of(run, tmp_path))
    ((given, profile),) = asked
    assert given == {"size": 1}
    assert (profile["name"], profile["folder"]) == ("a_b_c", str(RunDir(tmp_path).profile))


SERVING = (
    *("job=benchmark", "benchmark=serving", "benchmark.base_url=http://127.0.0.1:9", "benchmark.repeats=2"),
    *("benchmark.served_model_name=m", "benchmark.max_concurrency=[1,2]", "benchmark.slo_ttft_s=0.5"),
)


def test_levels_of_load_are_measured_in_turn_with_seeds_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[float, int]] = []

    def run_level(benchmark: Any, target: LoadTarget, level: float, *, seed: int, progress: Any) -> float:
        taken.append((level, seed))
        progress(1)
        return level

    def summarize(load: Any, *, slo: Any) -> dict[str, float]:
        assert slo.ttft_s == 0.5
        named = dict.fromkeys({*serving._QUANTITIES, *serving._SHOWN, "send_delay_p99_s"}, 1.0 * load)
        return {**named, "client_cpu_share": 0.25, "error/400": 3.0, "error/unfinished": 7.0}

    monkeypatch.setattr(serving, "run_level", run_level)
    monkeypatch.setattr(serving, "summarize_load", summarize)
    run = compose(SERVING).run
    results = serving.run_serving_benchmark(run.benchmark, context_of(run, tmp_path))  # type: ignore[arg-type]
    assert [level for level, _ in taken] == [1, 2, 1, 2]
    assert len({seed for _, seed in taken}) == 4
    assert results.metrics["max_concurrency=2/tokens_per_s"] == 2.0
    text = "\n".join(results.findings)
    line = "max_concurrency=1: errors 400 6"
    assert line in results.findings, "of both rounds, without those cancelled at the end"
    assert "at most 25.0% of a core" in text
    assert "goodput: TTFT at most 0.5 s" in text
    assert len(RunDir(tmp_path).metrics.read_text().splitlines()) == 4


@pytest.mark.parametrize(("word", "loop"), [("max_concurrency=[3]", "closed"), ("request_rate=[3]", "open")])
def test_a_level_is_a_number_of_calls_in_flight_or_a_rate(
    word: str, loop: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        serving, "closed_loop", lambda *_, max_concurrency, **__: called.append(("closed", max_concurrency))
    )
    monkeypatch.setattr(serving, "open_loop", lambda _, due, **__: called.append(("open", next(due).at_s)))
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt": "abc", "max_tokens": 3}\n')
    benchmark: Any = compose([*SERVING, f"benchmark.{word}", f"benchmark.trace={trace}"]).run.benchmark
    serving.run_level(benchmark, LoadTarget(address=None, model="m"), 3, seed=1, progress=lambda _: None)  # type: ignore[arg-type]
    ((name, value),) = called
    assert name == loop
    assert value == 3 if loop == "closed" else value >= 0
    requests = serving.level_requests(benchmark, seed=1)
    assert next(requests).fields == next(requests).fields, "a trace begins anew at its end"


def body_of(sent: bytes, headers: Mapping[str, str]) -> bytes:
    async def read() -> bytes:
        reader = asyncio.StreamReader()
        reader.feed_data(sent)
        reader.feed_eof()
        return await HttpResponse(reader, 200, headers).body()

    return asyncio.run(read())


def test_a_body_ends_where_its_headers_or_the_connection_say() -> None:
    assert body_of(b"abcdef", {"content-length": "3"}) == b"abc"
    assert body_of(b"abcdef", {}) == b"abcdef"
    assert body_of(b"3\r\nabc\r\n0\r\n\r\n", {"transfer-encoding": "chunked"}) == b"abc"
    for sent, headers in ((b"ab", {"content-length": "3"}), (b"3\r\nabc\r\n", {"transfer-encoding": "chunked"})):
        with pytest.raises(RequestError, match=r"cut|ended"):
            body_of(sent, headers)


def test_scores_of_tasks_are_metrics_rows_and_files_of_samples(tmp_path: Path) -> None:
    from launcher.benchmarks.lm_eval.tasks import _results

    found = {
        "results": {"a/b": {"acc,none": 0.5, "acc_stderr,none": 0.25, "f1,strict": 0.75, "alias": "a/b"}},
        "samples": {"a/b": [{"doc": "é"}]},
        "n-samples": {"a/b": {"effective": 4}},
        "n-shot": {"a/b": 2},
        "versions": {"a/b": 1.0},
    }
    for word, written in (("true", ["samples_a_b.jsonl"]), ("false", [])):
        folder = tmp_path / word
        folder.mkdir()
        words = ["job=benchmark", "benchmark=lm_eval", "benchmark.tasks=[a/b]", f"benchmark.log_samples={word}"]
        run = compose(words).run
        results = _results(run.benchmark, found, context_of(run, folder))  # type: ignore[arg-type]
        assert [path.name for path in folder.iterdir()] == written
    assert (tmp_path / "true" / "samples_a_b.jsonl").read_text() == '{"doc": "é"}\n'
    assert results.facts["a/b"] == {"version": 1.0, "num_fewshot": 2, "documents": 4}
    assert 0.5 in results.metrics.values()
    assert "| a/b | 2 | acc | 0.5000 | 0.2500 |" in results.tables
    assert "| a/b | 2 | f1 (strict) | 0.7500 |  |" in results.tables
    assert len(results.tables) == 4, "errors are in the rows of their metrics"


def test_a_corpus_is_tokenised_and_loaded_and_equal_digests_are_noticed(tmp_path: Path) -> None:
    from launcher.benchmarks.data import _findings, load_batches, tokenise
    from launcher.benchmarks.results import BenchmarkCase

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} says that {i} times {i} is {i * i}." for i in range(300)))
    words = ["job=benchmark", "benchmark=data", f"data.path={text}", "data.vocab_size=300", f"data.cache={tmp_path}"]
    run = compose([*words, "benchmark.threads=[1,2]"]).run
    first, again = (
        tokenise(run.data, run.model, tmp_path / "tokens", warmup=warmup, progress=lambda: None) for warmup in (0, 1)
    )
    assert first["digest"] == again["digest"]
    asked = {"sequence_length": 16, "micro_batch": 2, "duration_s": 0.01, "seed": 7}
    loads = [load_batches(run.data, run.model, **asked, warmup=warmup, progress=lambda: None) for warmup in (0, 2)]
    assert loads[0]["digest"] == loads[1]["digest"]
    samples = {"tokenise/1": [first], "tokenise/2": [again], "load": [loads[0], {**loads[1], "digest": "other"}]}
    cases = [
        BenchmarkCase(name=name, samples={key: tuple(one[key] for one in taken) for key in taken[0] if "_per_" in key})
        for name, taken in samples.items()
    ]
    prepared = {"text_bytes": 2_000_000, "tokens": 1000, "vocab_size": 300, "cold_s": 1.5}
    lines = list(_findings(run.benchmark, prepared, samples, cases))  # type: ignore[arg-type]
    assert "corpus: 2.00 MB of text are 1,000 tokens of a vocabulary of 300" in lines
    assert "tokens: the same every time" in lines
    assert "first batches: NOT the same: 2 different ones" in lines
    assert sum(" times " in line for line in lines) == 1


def test_ways_to_decode_that_are_slow_or_differ_are_named() -> None:
    from launcher.benchmarks.quantization import _findings
    from launcher.benchmarks.results import BenchmarkCase

    benchmark: Any = compose(["job=benchmark", "benchmark=quantization"]).run.benchmark
    seconds = {"fp32/eager": 1.0, "fp32/compiled": 0.5, "int4_weight/eager": 2.0}
    cases = [
        BenchmarkCase(name=name, samples={"token_s": (value,), "read_bytes": (1e9,), "first_s": (9.0,)})
        for name, value in seconds.items()
    ]
    samples = {name: [{"digest": "a"}, {"digest": "b" if "int4" in name else "a"}] for name in seconds}
    lines = list(_findings(benchmark, cases, samples, 4e9))
    assert "fp32/compiled: compiled in 9.0 s, from the cache in 9.0 s" in lines
    assert "best: fp32/compiled, 2.00 times fp32/eager" in lines
    assert [line for line in lines if "slower" in line] == [
        "int4_weight/eager is slower than fp32/eager on this machine"
    ]
    assert [line for line in lines if "NOT" in line] == ["int4_weight/eager: NOT the same tokens in every process"]


def test_policies_that_recompute_are_compared_with_none() -> None:
    from launcher.benchmarks.activation import _findings, _metrics
    from launcher.benchmarks.results import BenchmarkCase

    benchmark: Any = compose(["job=benchmark", "benchmark=activation"]).run.benchmark
    cases = [
        BenchmarkCase(name=name, samples={"peak_bytes": (peak,), "step_s": (step_s,)})
        for name, peak, step_s in (("none", 4e9, 1.0), ("every", 1e9, 1.5))
    ]
    compared = {"every": {"largest_difference": 0.0, "equal_tensors": 3, "tensors": 3}}
    assert _metrics(cases, compared) == {
        "every/memory_saved": 0.75,
        "every/time_added": 0.5,
        "every/largest_difference": 0.0,
    }
    samples = {name: [{"weights": "w", "inputs": name}] for name in ("none", "every")}
    lines = list(_findings(benchmark, cases, compared, samples))
    assert "memory saved (every): 75.0%" in lines
    assert "weights and inputs: NOT the same: 2 different ones" in lines


QUANTIZE = (
    *("job=quantize", "quantization=int4_weight", "model=gpt2_tiny", "parallel=single", "job.tokenizer=bytes"),
    *("job.eval_sequences=2", "job.sequence_length=16", "job.rate_batches=[1]", "job.rate_prompt=4"),
    *("job.rate_tokens=2", "job.repeats=2", "job.sample_tokens=2"),
)


@pytest.mark.parametrize("slow_s", [1000.0, 0.0])
def test_a_model_is_quantized_kept_and_measured_once_more_where_that_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slow_s: float
) -> None:
    from launcher.benchmarks import quantize

    monkeypatch.setattr(quantize, "SLOW_S", slow_s)
    run = compose([*QUANTIZE, f"data.cache={tmp_path / 'cache'}"]).run
    quantize.quantize_model(run.job, context_of(run, tmp_path))  # type: ignore[arg-type]
    report = json.loads((tmp_path / "quantize.json").read_text())
    rounds = report["rates"]["engine"]["1"]["after"]
    assert len(rounds) == (2 if slow_s else 1), "a slow round is its own warm-up"
    assert all(min(taken.values()) > 0 for taken in rounds)
    printed = capsys.readouterr().out
    assert ("measured once" in printed) == (not slow_s)
    assert "weights are random, so no tokenizer is put beside them" in printed
    assert list(report["disk_bytes"]) == ["after"]
    assert (tmp_path / "model" / "quantization.json").exists()
    assert set(report["samples"]) == {"before", "after"}
