"""The job ``quantize`` as a real run, what other jobs make of its folder, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from launcher.errors import ConfigErrors
from launcher.utils.files import read_json

WORDS = (
    *("model=gpt2_tiny", "parallel=single", "backend.ranks=1", "backend.threads=1", "tracker=local"),
    *("job.eval_sequences=16", "job.sequence_length=32"),
)


def test_what_is_kept_is_what_other_jobs_load_and_what_they_quantize_themselves(launch, tmp_path: Path) -> None:
    quick = ("job.rate_batches=[1]", "job.rate_prompt=8", "job.rate_tokens=4", "job.repeats=1", "job.tokenizer=bytes")
    training = ("job.steps=60", "job.eval_every=60", "job.sample_tokens=1", "checkpoint.at_end=true")
    launch(*WORDS[:5], *training, "run.dir=trained").expect(0)
    (weights,) = (tmp_path / "trained").glob("checkpoints/*/**/model")
    trained = f"model.weights={weights}"
    launch("job=quantize", "quantization=int4_weight", trained, *WORDS, *quick, "run.dir=made").expect(0)
    report = read_json(tmp_path / "made" / "quantize.json")
    assert report["layers"] == 4 * 4
    assert report["share_of_bf16"] < 0.31
    kept = report["fidelity"]
    assert kept["perplexity_after"] != kept["perplexity_before"]
    assert kept["growth"] == pytest.approx(kept["perplexity_after"] / kept["perplexity_before"] - 1)
    assert abs(kept["growth"]) < 0.08
    assert 0 < kept["divergence"] < 0.05
    page = (tmp_path / "made" / "quantize.md").read_text()
    for row in ("quantized layers, in memory", "same most likely token", "decode, 1 at a time, the launcher's engine"):
        assert f"| {row}" in page
    folder = tmp_path / "made" / "model"
    assert {"config.json", "model.safetensors", "quantization.json"} <= {file.name for file in folder.iterdir()}

    losses = {}
    ways = {"folder": (f"model.weights={folder}",), "itself": (trained, "model.quantization=int4_weight")}
    for name, words in ways.items():
        ranks = ("parallel=ddp", "backend.ranks=2") if name == "itself" else ()  # replicas need no gradients averaged
        launch("job=evaluate", *WORDS, *words, *ranks, f"run.dir={name}").expect(0)
        losses[name] = read_json(tmp_path / name / "result.json")["metrics"]["eval/loss"]
    assert losses["folder"] == pytest.approx(losses["itself"], rel=1e-6)  # sums over two ranks have another order
    assert math.exp(losses["folder"]) == pytest.approx(kept["perplexity_after"], rel=1e-6)

    again = launch("job=quantize", "quantization=int4_weight", *WORDS, "run.dir=again", f"job.output={folder}")
    again.expect(2)
    assert "nothing is overwritten" in again.output

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    generate = ("job=generate", "job.tokenizer=bytes", "job.max_tokens=8", f"job.input={prompts}", *WORDS[:5])
    generated = launch(*generate, f"model.weights={folder}", "run.dir=generated").expect(0)
    assert "single matrices by compiled kernels" in generated.output
    assert "quantized layers by their library's own" not in generated.output
    lines = (tmp_path / "generated" / "generated.jsonl").read_text().splitlines()
    assert [json.loads(line)["completion_tokens"] for line in lines] == [8, 8]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("job=quantize",), "job=quantize needs a quantization method; set quantization=int8_weight"),
        (("quantization=nf4",), "set model.quantization=nf4 to quantize while loading, or job=quantize to save"),
        (("model.quantization=nf4",), "quantized layers cannot be trained"),
        (("job=quantize", "quantization=nf4", "backend.ranks=2"), "set backend.ranks=1 parallel=single"),
        (
            ("job=quantize", "quantization=nf4", "model=smollm2_135m", "data.tokenizer=bpe"),
            "the perplexity of smollm2_135m is meaningful for its own tokenizer only; set data.tokenizer=model",
        ),
        (
            ("job=quantize", "quantization=nf4", "model.quantization=fp8", "parallel=single"),
            "set model.quantization=none quantization=fp8",
        ),
        (("job=evaluate", "model.quantization=fp8", "parallel=zero3"), "quantized ones cannot be split"),
        (("job=benchmark", "benchmark=memory", "model.quantization=fp8"), "benchmark=memory trains the model"),
        (
            ("job=generate", "job.engine=vllm", "job.vllm_python=python", "model.quantization=fp8"),
            "vLLM loads the weights as they are in the folder; set job.engine=paged",
        ),
        (("job=quantize", "quantization=int4_weight", "quantization.group_size=33"), "two weights share a byte"),
        (("job=evaluate", "model.quantization=int3"), "model.quantization=int3"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(plan_of, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigErrors) as refused:
        plan_of(*words)
    assert said in str(refused.value)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.config.quantization import Int8Weight, Nf4

    monkeypatch.setattr("launcher.config.quantization.importlib.util.find_spec", lambda name: None)
    (problem,) = Int8Weight().validate_machine("model.quantization")
    assert str(problem) == (
        "model.quantization=int8_weight: the package torchao is not installed; "
        "pip install 'launcher[quantize]', or set model.quantization=none"
    )
    (problem,) = Nf4().validate_machine("quantization")
    assert "bitsandbytes" in str(problem)


def test_a_folder_of_few_bits_is_refused_where_it_would_be_learnt_or_quantized_again(tmp_path: Path) -> None:
    from launcher.config.compose import compose
    from launcher.config.quantization import Int4Weight, QuantizationManifest
    from launcher.execution.validate import validate_machine

    folder = tmp_path / "weights"
    folder.mkdir()
    QuantizationManifest(method=Int4Weight(), layers=("a",)).write(folder)
    weights = f"model.weights={folder}"
    for words, said in (
        ((weights,), "quantized layers cannot be trained; give weights that are not quantized"),
        ((weights, "job=evaluate", "parallel=zero3"), "quantized ones cannot be split; set parallel=single"),
        ((weights, "job=quantize", "quantization=int4_weight"), "its weights are already quantized"),
    ):
        found = [str(problem) for problem in validate_machine(compose(words).run, tmp_path / "run", hosts=[])]
        assert any(problem.startswith(weights) and said in problem for problem in found), found


def test_weights_that_cannot_be_written_leave_every_neighbour_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.benchmarks import quantize  # seconds, which the other tests here need not wait for

    def full(_model: object, _method: object, folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    mine = tmp_path / "model.incomplete"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    monkeypatch.setattr(quantize, "save_quantized", full)
    with pytest.raises(OSError, match="No space"):
        quantize._save(None, None, tmp_path / "model", source=tmp_path, context=None)
    assert [path.name for path in tmp_path.rglob("*")] == ["model.incomplete", "thesis.tex"]
