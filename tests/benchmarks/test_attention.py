"""Row 2 of the article: memory by kernel of attention, how it grows, and errors, by the real command at small sizes."""

from __future__ import annotations

import json

import pytest

from launcher.benchmarks.results import power_law_exponent
from launcher.config.compose import compose
from launcher.errors import ConfigErrors
from tests.benchmarks.conftest import CallIsolated

WORDS = ("job=benchmark", "benchmark=attention", "parallel=single", "tracker=local")
SIZES = {"batch_size": 2, "hidden_size": 64, "num_attention_heads": 4, "precision": "fp32", "seed": 3, "rank": 0}
BRIEF = ("benchmark.repeats=1", "benchmark.passes=forward", "benchmark.batch_size=2")
NO_FLEX = ("mha_weights", "mha", "mha_eval", "eager", "sdpa_math", "sdpa_flash")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> str:
    from launcher.benchmarks.attention_kernels import write_reference

    file = str(tmp_path_factory.mktemp("exact") / "160.safetensors")
    write_reference(keep={"160": file}, backward=True, progress=lambda: None, **SIZES)
    return file


def measured(kernel: str, reference: str, *, backward: bool, **others) -> dict:
    from launcher.benchmarks.attention_kernels import measure_kernel

    sizes = {**SIZES, "sequence_length": 160, **others}
    return measure_kernel(
        kernel=kernel, backward=backward, warmup=0, reference=reference, progress=lambda: None, **sizes
    )


def test_the_reference_is_what_torch_computes_in_fp64(reference, monkeypatch) -> None:
    import torch
    from safetensors.torch import load_file

    from launcher.benchmarks import attention_kernels as module
    from launcher.benchmarks.attention_kernels import make_layer

    layer, inputs, incoming = make_layer(sequence_length=160, **SIZES)
    leaf = inputs.double().requires_grad_()
    output = layer.double()(leaf, leaf, leaf)[0]
    output.backward(incoming.double())
    found = load_file(reference)
    torch.testing.assert_close(found["output"], output.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["gradient"], leaf.grad, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 4 * 160 * 30)  # blocks of 30 queries, the last one of 10
    in_blocks = reference + ".blocks"
    module.write_reference(keep={"160": in_blocks}, backward=True, progress=lambda: None, **SIZES)
    torch.testing.assert_close(load_file(in_blocks), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", NO_FLEX)
def test_every_kernel_is_within_rounding_of_the_formula(kernel: str, reference) -> None:
    from launcher.config.benchmark.attention import TOLERANCES

    forward = measured(kernel, reference, backward=False)
    assert 0 < forward["output_relative"] < TOLERANCES["fp32"]
    assert "gradient_relative" not in forward
    if kernel != "mha_eval":
        backward = measured(kernel, reference, backward=True)
        assert 0 < backward["output_relative"] < TOLERANCES["fp32"]
        assert 0 < backward["gradient_relative"] < TOLERANCES["fp32"]
        assert (backward["weights"], backward["inputs"]) == (forward["weights"], forward["inputs"])


def test_another_format_or_another_formula_is_no_rounding_of_fp32(reference, monkeypatch) -> None:
    from launcher.benchmarks import attention_kernels
    from launcher.config.benchmark.attention import TOLERANCES

    short = measured("sdpa_flash", reference, backward=True, precision="bf16")
    assert short["output_relative"] > 100 * TOLERANCES["fp32"]
    assert short["gradient_relative"] > 100 * TOLERANCES["fp32"]
    unscaled = attention_kernels._between_projections(
        lambda query, key, value: (query @ key.transpose(-2, -1)).softmax(-1) @ value
    )
    monkeypatch.setitem(attention_kernels.KERNEL_FUNCTIONS, "eager", unscaled)
    assert measured("eager", reference, backward=False)["output_relative"] > 1e-2


def test_a_kernel_that_cannot_do_something_here_says_why(call_isolated: CallIsolated) -> None:
    asked = {**SIZES, "kernels": ("mha", "sdpa_flash", "flex"), "passes": ("backward",)}
    (here,) = call_isolated("launcher.benchmarks.attention_kernels:probe_kernels", asked)
    assert here["free_bytes"] > 2**28
    assert list(here["lacking"]) == ["flex/backward"]
    assert here["lacking"]["flex/backward"].startswith("FlexAttention does not support backward on CPU")


def test_only_a_kernel_that_torch_lacks_is_left_out(monkeypatch) -> None:
    from launcher.benchmarks import attention_kernels

    def run_kernel(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(attention_kernels, "run_kernel", run_kernel)
    asked = {**SIZES, "kernels": ("sdpa_flash",), "passes": ("forward",), "progress": lambda: None}
    said = "No available kernel. Aborting execution.\nmore"
    lacking = attention_kernels.probe_kernels(**asked)["lacking"]
    assert lacking == {"sdpa_flash/forward": "No available kernel. Aborting execution."}
    said = "shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        attention_kernels.probe_kernels(**asked)


def test_the_command_finds_how_memory_grows(launch) -> None:
    kernels, sizes = "benchmark.kernels=[mha_weights,eager,sdpa_flash]", "benchmark.sequence_lengths=[1024,2048]"
    ended = launch(*WORDS, kernels, sizes, *BRIEF).expect(0)
    found = json.loads((ended.run_dir / "benchmark.json").read_text())
    metrics = found["metrics"]
    assert 0.85 < metrics["sdpa_flash/forward/memory_exponent"] < 1.15
    assert 1.8 < metrics["eager/forward/memory_exponent"] < 2.1
    assert 1.8 < metrics["mha_weights/forward/memory_exponent"] < 2.1
    assert 0.9 < metrics["sdpa_flash/forward/memory_saved"] < 1
    assert max(value for name, value in metrics.items() if name.endswith("largest_relative_error")) < 5e-6
    assert all(found["facts"][name]["within_rounding"] for name in found["cases"])
    assert set(found["cases"]["eager/forward/2048"]) == {"peak_mb", "step_ms"}
    table = (ended.run_dir / "benchmark.md").read_text()
    for line in (
        "peak of nn.MultiheadAttention (forward, sequence 2,048, batch 2): ",
        "peak of flash attention (forward, sequence 2,048, batch 2): ",
        "memory saved (forward, sequence 2,048, batch 2): 9",
        "eager, forward: extra memory grows as sequence^",
        "(least squares over 1,024, 2,048; ",
        "within rounding (at most 5e-06 of it)",
        "weights and inputs: the same in every process",
        "| sequence | 1,024 | 2,048 |",
    ):
        assert line in table
    assert (ended.run_dir / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert list(ended.run_dir.glob("references-*")) == []


def test_what_does_not_fit_into_memory_or_is_not_offered_is_left_out_with_a_line_each() -> None:
    from launcher.benchmarks.attention import choose_points

    run = compose([*WORDS, "benchmark.kernels=[eager,sdpa_flash,flex]", "benchmark.sequence_lengths=[256,8192]"]).run
    why = {"flex/backward": "no backward on CPU"}
    points, left_out = choose_points(run.benchmark, run, free_bytes=4 * 10**9, lacking=why)
    names = [point.name for point in points]
    assert names[:5] == [f"{k}/forward/256" for k in ("eager", "sdpa_flash", "flex")] + [
        f"{k}/backward/256" for k in ("eager", "sdpa_flash")
    ]
    assert names[5:] == ["sdpa_flash/forward/8192", "flex/forward/8192", "sdpa_flash/backward/8192"]
    assert left_out[0] == "left out: flex, backward: no backward on CPU"
    assert left_out[1].startswith("left out: eager/forward/8192: takes about 7")
    assert left_out[1].endswith("GiB, and 3.73 GiB are free")
    assert len(left_out) == 3


def test_an_exponent_is_that_of_the_power_law() -> None:
    assert power_law_exponent({size: 7 * size**1.5 for size in (3, 50, 1000)}) == pytest.approx(1.5)
    assert power_law_exponent({100: 1, 200: 4, 400: 16}) == pytest.approx(2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("benchmark.num_attention_heads=7",),
            r"benchmark\.num_attention_heads=7.*: 7 heads do not divide hidden_size=512; set .*_heads=4",
        ),
        (("benchmark.sequence_lengths=[]",), r"benchmark\.sequence_lengths.*: needs distinct lengths"),
        (("benchmark.sequence_lengths=[64,64]",), r"benchmark\.sequence_lengths.*: needs distinct lengths"),
        (("benchmark.kernels=[eager,eager]",), r"benchmark\.kernels.*: is empty or has duplicates"),
        (("benchmark.kernels=[flush]",), "is not one of mha_weights, mha, "),
        (
            ("benchmark.kernels=[mha_eval]", "benchmark.passes=backward"),
            r"benchmark\.passes=backward.*no backward pass",
        ),
        (("benchmark.tolerance=0",), r"benchmark\.tolerance=0.*: must be above 0"),
        (("precision=tf32",), r"precision=tf32.*: the whole layer is computed in one format"),
    ],
)
def test_nonsense_is_refused(plan_of, words, message) -> None:
    from launcher.protocol.plan import Host

    with pytest.raises(ConfigErrors, match=message):
        plan_of(*WORDS, *words, hosts=[Host(name="box", slots=1, cores=4)])
