"""Tasks of lm-evaluation-harness on the run's model: the figures of its own ``hf`` model, over two ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launcher.config.benchmark.lm_eval import LmEvalBenchmark
from launcher.config.data.bpe import train_byte_level_bpe
from launcher.config.lm_eval_tasks import TaskRequest
from launcher.errors import ConfigError, ConfigErrors
from launcher.training.task_evaluation import _kept_generators
from tests.helpers import losses
from tests.inference.peft_adapters import save_adapter

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "The colour of {{thing}} is"
doc_to_target: "{{answer}}"
doc_to_choice: ["red", "dark blue", "green"]
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWER = """
task: echoes
dataset_path: json
dataset_kwargs: {data_files: {test: colours.json}}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["a"], max_gen_toks: 5, do_sample: false}
doc_to_text: "Say {{thing}}:"
doc_to_target: "{{thing}}"
metric_list: [{metric: exact_match}]
"""
PROSE = """
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: colours.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
THINGS = ("grass", "a rose", "the sky", "blood", "the deep sea", "moss", "an apple")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets  # noqa: F401  (reads these variables once: they are for the runs, not for other tests)

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [
        {"thing": thing, "answer": number % 3, "text": f"{thing} has a colour. " * (number + 3)}
        for number, thing in enumerate(THINGS)
    ]
    (tmp_path / "colours.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("colours", CHOICE), ("echoes", ANSWER), ("prose", PROSE)):
        (tmp_path / f"{name}.yaml").write_text(text)
    inner = train_byte_level_bpe([row["text"] for row in rows], vocab_size=300)
    inner.add_special_tokens(["<|end|>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=inner.token_to_id("<|end|>"),
        bos_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>").save_pretrained(tmp_path / "model")
    return tmp_path


NAMES = ("colours", "echoes", "prose")
BENCHMARK = ("job=benchmark", "benchmark=lm_eval", "tracker=local", "backend.threads=1")
LM_EVAL = (*BENCHMARK, "model=hf")


def reference(folder: Path) -> dict[str, Any]:
    """Return what lm_eval's own model for Transformers finds."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = simple_evaluate(
        "hf",
        model_args={"pretrained": str(folder / "model"), "dtype": "float32"},
        tasks=[str(folder / f"{name}.yaml") for name in NAMES],
        device="cpu",
        batch_size=3,
        bootstrap_iters=100,
        task_manager=TaskManager(include_defaults=False),  # seconds for thousands of files
    )
    return found


@pytest.mark.filterwarnings("default")
def test_figures_on_two_ranks_are_those_of_the_harness_in_one_process(
    launch: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tasks)
    expected = reference(tasks)
    files = ",".join(f"{name}.yaml" for name in NAMES)
    words = (
        *LM_EVAL,
        f"model.name={tasks / 'model'}",
        f"benchmark.tasks=[{files}]",
        "benchmark.log_samples=true",
        "benchmark.bootstrap_iters=100",
    )
    for ranks in (2,):
        launch(*words, f"backend.ranks={ranks}", f"run.dir=ranks{ranks}").expect(0)
        found = json.loads((tasks / f"ranks{ranks}" / "benchmark.json").read_text())
        for task, values in expected["results"].items():
            for name, value in values.items():
                metric, _, of_filter = name.partition(",")
                if of_filter == "none" and isinstance(value, float):
                    assert found["metrics"][f"{task}/{metric}"] == pytest.approx(value, rel=1e-5), (ranks, task, metric)
        assert found["metrics"]["colours/acc_stderr"] > 0
        for task in NAMES:
            lines = (tasks / f"ranks{ranks}" / f"samples_{task}.jsonl").read_text().splitlines()
            own = {sample["doc_id"]: sample["resps"] for sample in map(json.loads, lines)}
            assert own.keys() == set(range(len(THINGS)))
            for sample in expected["samples"][task]:
                assert _flat(own[sample["doc_id"]]) == _flat(sample["resps"]), (ranks, task)
    assert "| colours | 0 | acc |" in (tasks / "ranks2" / "benchmark.md").read_text()


@pytest.mark.filterwarnings("default")
def test_figures_of_an_adapter_are_those_of_the_harness_with_peft(
    launch: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness's own option ``peft`` resizes the vocabulary to the tokenizer's, so it gets PEFT's model itself."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tasks)
    base = LlamaForCausalLM.from_pretrained(tasks / "model")
    targets = ["q_proj", "down_proj"]
    adapted: Any = save_adapter(base, tasks / "adapter", seed=1, r=4, lora_alpha=64, target_modules=targets)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tasks / "model")
    beside, alone = (
        simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=["prose.yaml"],
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )
        for model in (adapted.merge_and_unload(), base)
    )
    launch(
        *(*LM_EVAL, f"model.name={tasks / 'model'}", "model.adapter=adapter", "benchmark.tasks=[prose.yaml]"),
        *("backend.ranks=1", "run.dir=adapted", "benchmark.bootstrap_iters=0"),
    ).expect(0)
    found = json.loads((tasks / "adapted" / "benchmark.json").read_text())["metrics"]["prose/bits_per_byte"]
    expected, without = (each["results"]["prose"]["bits_per_byte,none"] for each in (beside, alone))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(without, rel=1e-3)


QUANTIZE = (
    *("job=quantize", "model=hf", "precision=fp32", "backend.ranks=1", "backend.threads=1", "tracker=local"),
    *("data=text", "data.path=text.txt", "data.tokenizer=model", "data.cache=cache", "job.sequence_length=16"),
    *("job.eval_sequences=4", "job.rate_batches=[]", "job.sample_tokens=4"),
)


@pytest.mark.filterwarnings("default")
def test_figures_of_a_quantized_folder_are_those_of_the_harness(
    launch: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    def figures(folder: Path) -> dict[str, Any]:
        model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3)
        found: dict[str, Any] = simple_evaluate(model, tasks=files, bootstrap_iters=0)["results"]
        return found

    monkeypatch.chdir(tasks)
    files = [f"{name}.yaml" for name in NAMES]
    (tasks / "text.txt").write_text("grass has a colour. the sky has another. " * 100)
    words = (f"model.name={tasks / 'model'}", "quantization=int8_weight", "job.output=quantized")
    launch(*QUANTIZE, *words, "run.dir=quantize").expect(0)
    launch(
        *(*BENCHMARK, "model.weights=quantized", f"benchmark.tasks=[{','.join(files)}]", "precision=fp32"),
        *("backend.ranks=1", "run.dir=answered", "benchmark.bootstrap_iters=0", "benchmark.batch_size=3"),
    ).expect(0)
    found = json.loads((tasks / "answered" / "benchmark.json").read_text())["metrics"]
    expected, whole = figures(tasks / "quantized"), figures(tasks / "model")
    assert found
    for name, value in found.items():
        task, metric = name.split("/")
        assert value == pytest.approx(expected[task][f"{metric},none"], rel=1e-5), name
    bits = "bits_per_byte"
    assert found[f"prose/{bits}"] != pytest.approx(whole["prose"][f"{bits},none"], rel=1e-4), "nothing was quantized"


TRAIN = (
    *(
        "model=hf",
        "model.weights=pretrained",
        "data=text",
        "data.path=text.txt",
        "data.tokenizer=model",
        "data.cache=cache",
    ),
    *("tracker=local", "backend.threads=1", "backend.ranks=2", "job.sequence_length=32", "job.micro_batch=2"),
    *("job.steps=2", "job.eval_every=1", "job.sample_tokens=0", "optimizer.lr=1e-2", "schedule=constant"),
    *("checkpoint.every=1", "checkpoint.keep=0", "precision=fp32"),
)


@pytest.mark.filterwarnings("default")
def test_evaluations_of_a_run_find_what_the_benchmark_finds_with_its_checkpoints(
    launch: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tasks)
    (tasks / "text.txt").write_text("grass has a colour. the sky has another. " * 100)
    files = ",".join(f"{name}.yaml" for name in NAMES)
    words = (*TRAIN, f"model.name={tasks / 'model'}", "parallel=fsdp", f"job.eval_tasks=[{files}]")
    launch(*words, "run.dir=run", "checkpoint.best_metric=min:lm_eval/prose/bits_per_byte").expect(0)
    words = (*BENCHMARK, "model.weights=run@step_00000001", f"benchmark.tasks=[{files}]", "benchmark.bootstrap_iters=0")
    launch(*words, "backend.ranks=1", "run.dir=beside").expect(0)
    found = json.loads((tasks / "beside" / "benchmark.json").read_text())["metrics"]
    assert len(found) >= 5
    for name, value in found.items():
        assert losses(tasks / "run", f"eval/lm_eval/{name}")[1] == pytest.approx(value, rel=1e-5), name
    first, last = losses(tasks / "run", "eval/lm_eval/prose/bits_per_byte").values()
    assert first != pytest.approx(last, rel=1e-3)


def test_the_generators_of_training_do_not_notice_tasks() -> None:
    import random

    import numpy as np

    def drawn() -> list[float]:
        return [random.random(), float(np.random.random()), torch.rand(1).item()]

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = [drawn(), drawn()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    before = drawn()
    with _kept_generators():
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        drawn()
    assert [before, drawn()] == expected


def _flat(answers: Any) -> list[Any]:
    """Return log-likelihoods as numbers to compare within 1e-5, and texts as they are."""
    if isinstance(answers, list | tuple):
        return [each for answer in answers for each in _flat(answer)]
    return [pytest.approx(answers, abs=1e-5) if isinstance(answers, float) else answers]


def test_an_unknown_task_is_named_with_the_closest(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import manager

    from launcher.training.lm_eval_harness import make_task_manager  # lm_eval takes five seconds to import

    arc = Path(manager.__file__).with_name("arc")  # one folder of its thousands of files
    monkeypatch.setattr(manager, "__file__", str(arc / "manager.py"))
    (tasks / "tasks").mkdir()
    (tasks / "tasks" / "own.yaml").write_text(CHOICE)
    words = {"include_path": (str(tasks / "tasks"),)}
    with pytest.raises(ConfigError, match=r"benchmark\.tasks=arc_eazy: is no task .*arc_easy"):
        make_task_manager(LmEvalBenchmark(tasks=("arc_easy", "colours", "arc_eazy"), **words).request)


def test_more_ranks_than_documents_are_refused(plan_of: Any, tasks: Path) -> None:
    words = (
        *LM_EVAL,
        f"model.name={tasks / 'model'}",
        f"benchmark.tasks=[{tasks / 'colours.yaml'}]",
        "backend.ranks=2",
    )
    with pytest.raises(ConfigErrors, match="leaves no document for some of the 2 ranks"):
        plan_of(*words, "benchmark.limit=1")


@pytest.mark.filterwarnings("default")
def test_a_task_with_fewer_documents_than_ranks_is_refused(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.training.lm_eval_harness import make_task_manager

    monkeypatch.chdir(tasks)
    benchmark = LmEvalBenchmark(tasks=("colours.yaml",))
    with pytest.raises(ConfigError, match=r"benchmark\.tasks=colours: has 7 documents for 8 ranks.*backend\.ranks=7"):
        make_task_manager(benchmark.request, num_ranks=8).load(list(benchmark.tasks))
    assert list(make_task_manager(benchmark.request, num_ranks=7).load(list(benchmark.tasks))["tasks"]) == ["colours"]


@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ("benchmark.tasks", r"set benchmark\.run_unsafe_code=true"),
        ("job.eval_tasks", r"leave it out, and answer it on a checkpoint: benchmark=lm_eval"),
    ],
)
def test_code_that_a_model_writes_is_refused_before_anything_is_answered(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, option: str, fix: str
) -> None:
    """Training loads its tasks at the start."""
    from launcher.training.lm_eval_harness import check_tasks, make_task_manager

    monkeypatch.chdir(tasks)
    file = tasks / "code.yaml"
    file.write_text((tasks / "colours.yaml").read_text() + "\nunsafe_code: true\n")
    request = TaskRequest(option=option, tasks=(str(file),))
    with pytest.raises(ConfigError, match=rf"{option}=colours: runs code that the model writes; {fix}"):
        check_tasks(request, make_task_manager(request))
    allowed = replace(request, run_unsafe_code=True)
    check_tasks(allowed, make_task_manager(allowed))


def test_data_that_is_gone_is_an_error_of_the_option(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.training.lm_eval_harness import check_tasks, make_task_manager

    monkeypatch.chdir(tasks)
    request = TaskRequest(option="job.eval_tasks", tasks=(str(tasks / "colours.yaml"),))
    (tasks / "colours.json").unlink()
    with pytest.raises(ConfigError, match=r"job\.eval_tasks=.*colours\.yaml"):
        check_tasks(request, make_task_manager(request))
