"""What a user can do wrong, through the whole command line: one message, exit code 2, nothing started or written."""

import os
import shlex
import socket
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import CheckpointManifest, write_manifest
from launcher.cli.verbs import VERBS


@pytest.fixture
def refused(launch_in_process, tmp_path):
    def check(*words, **options):
        before = set(tmp_path.rglob("*"))
        ended = launch_in_process(*words, **options).expect(2)
        assert "Traceback" not in ended.output
        assert ended.stdout == ""
        assert set(tmp_path.rglob("*")) == before, "something was written"
        return ended.stderr

    return check


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            ["job.global_batch=17"],
            ["job.global_batch=17", "micro 8 × dp 2 = 16 does not divide 17", "job.global_batch=16"],
        ),
        (["parallel=single", "backend.ranks=2"], ["the run has 2 ranks", "set parallel=ddp or backend.ranks=1"]),
        (["job.sequence_length=512"], ["job.sequence_length=512", "256"]),
        (["data.path=nowhere.txt"], ["data.path=nowhere.txt"]),
        (["parallel=zero2", "parallel.offload_parameters=cpu"], ["parallel.offload_parameters=cpu", "stage"]),
        (["parallel=zero0", "parallel.offload_optimizer=cpu"], ["parallel.offload_optimizer=cpu"]),
        (["parallel=zero3", "parallel.offload_optimizer=nvme"], ["parallel.nvme_path"]),
        (["parallel=zero3", "parallel.deepspeed.zero_optimisation.stage=3"], ["did you mean zero_optimization"]),
        (["parallel=zero3", "precision=fp16", "+parallel.deepspeed.bf16.enabled=true"], ["parallel.deepspeed.bf16"]),
        (["precision=tf32"], ["precision=tf32", "only GPUs", "set precision=fp32"]),
        (["activation=every_k", "activation.k=0"], ["activation.k=0", "must be at least 1"]),
        (["optimizer.lr=nan"], ["optimizer.lr=nan", "must be finite"]),
        (["job.clip_norm=-inf"], ["job.clip_norm=-inf", "must be finite"]),
        (["compile=maybe"], ["compile=maybe", "no such option"]),
        (["compile=true", "parallel=zero3"], ["compile=true", "ZeRO-3", "set parallel=zero2 or compile=false"]),
        (["optimizer.implementation=native"], ["optimizer.implementation=native", "=torch"]),
        (["checkpoint.resume=nowhere"], ["checkpoint.resume=nowhere"]),
        (["tracker.mode=online"], ["tracker.mode=online", "WANDB_API_KEY"]),
        (["backend.ranks=0"], ["backend.ranks=0", "must be at least 1"]),
        (["backend.env.MY_TOKEN=x"], ["backend.env.MY_TOKEN", "secret"]),
        (
            ["backend.env.A-B=x"],
            ["backend.env: 'A-B' is not a valid name of a variable", "write backend.env.A_B=<value>"],
        ),
        (
            ["backend=kubernetes", "backend.image=a/b:1", "backend.env={A.B: x}"],
            ["'A.B' is not a valid name", "backend.env.A_B=<value>"],
        ),
        (["backend=slurm", "backend.env.A-B=x"], ["'A-B' is not a valid name of a variable"]),
        (["backend=slurm", "backend.mem=16"], ["backend.mem=16", "16.00 MiB", "set backend.mem=16G"]),
        (
            ["backend=kubernetes", "backend.image=a/b:1", "backend.memory=16"],
            ["backend.memory=16", "is 16 B", "set backend.memory=16Gi"],
        ),
        (
            ["backend=kubernetes", "backend.image=a/b:1", "backend.shared_memory=64"],
            ["backend.shared_memory=64", "is 64 B", "set backend.shared_memory=64Mi"],
        ),
        (["backend.env={1: x}"], ["backend.env", "has the key 1", "write backend.env.1=<value>"]),
        (["parallel=zero3", "parallel.deepspeed={true: x}"], ["parallel.deepspeed", "has the key true"]),
        (
            ["backend=kubernetes", "backend.image=a/b:1", "backend.volumes={1: /x}"],
            ["backend.volumes", "has the key 1,"],
        ),
        (
            ["job=benchmark", "benchmark=serving", "benchmark.extra_body={1: 2}"],
            ["benchmark.extra_body", "has the key 1"],
        ),
        (["pln"], ["pln", "did you mean plan?"]),
        (["--jsn"], ["--jsn: no such flag; did you mean --json?"]),
        (["dry_run=maybe"], ["dry_run=maybe"]),
        (["resume", "nowhere"], ["run=nowhere", "is not a run directory"]),
        (["-m", "job.seed=1,2", "job.stpes=3"], ["did you mean steps?"]),
        (["+sweep=lr_bacth"], ["did you mean lr_batch?"]),
    ],
)
def test_a_mistake_is_one_clear_message(refused, words, messages):
    said = refused(*words)
    for message in messages:
        assert message in said
    assert len(said.strip().splitlines()) == 1, said


def test_mistakes_of_every_kind_come_at_once(refused):
    said = refused("modle=gpt2", "job.stpes=1", "optimizer.lr=fast", "job.micro_batch=0")
    assert len(said.strip().splitlines()) == 4


def test_data_that_is_empty_or_not_text(refused, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2" * 100)
    assert "empty" in refused("data.path=empty.txt")
    assert "binary.txt" in refused("data.path=binary.txt")


def test_data_whose_rows_or_size_cannot_work(refused, tmp_path):
    """What the plan can know of local data it says, in one message that names what works."""
    rows = "".join(f'{{"body": "some words of row {row}"}}\n' for row in range(900))
    (tmp_path / "x.jsonl").write_text(rows)
    (tmp_path / "x.html").write_text("<!doctype html><p>some words")
    (tmp_path / "short.txt").write_text("one short line\n")
    (tmp_path / "part.jsonl").write_text('{"body": "a"}\n' * 3)
    overrides = "data=hf data.path=json 'data.files=[x.jsonl]' data.column=body data.vocab_size=2048"
    for words, expected in (
        (
            ("data=text", "data.path=x.jsonl"),
            f"x.jsonl: holds JSON lines, not plain text; set {overrides}, or data.format=text",
        ),
        (("data.path=short.txt",), "data.path: has 5 tokens, 5 to train on and 0 to evaluate"),
        (("data=hf", "data.path=x.jsonl"), "is a file, not a folder or a data set of the hub"),
        (
            ("data=hf", "data.path=json", "data.files=[x.jsonl]", "data.vocab_size=400"),
            "data.column=text: x.jsonl has no such column; it has body; choose from: body",
        ),
        (("job=generate", "job.input=part.jsonl"), "line 1: body: no such field; did you mean prompt? (all 3 lines"),
        (
            ("job=generate", "job.tokenizer=data", "data=text", "data.path=x.jsonl"),
            "x.jsonl: holds JSON lines, not plain text",
        ),
        (("data.path=x.html",), "x.html: holds HTML or XML, not plain text; extract its text, or set data.format=text"),
    ):
        assert expected in refused(*words)


def test_the_overrides_that_a_message_names_for_a_file_of_rows_are_enough(refused, tmp_path, launch_in_process):
    """The default model has room for the tokenizer that is trained on rows too."""
    rows = "".join(f'{{"text": "some words of row {row}"}}\n' for row in range(900))
    (tmp_path / "x.jsonl").write_text(rows)
    for words in (("data=hf", "data.path=x.jsonl"), ("data=text", "data.path=x.jsonl")):
        said = refused(*words)
        assert len(said.splitlines()) == 1
        advised = shlex.split(said.partition("; set ")[2].partition(", or ")[0])
        launch_in_process("plan", *advised).expect(0)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            [
                *("job=generate", "job.tokenizer=bytes", "optimizer.lr=1"),
                *("schedule=constant", "data=synthetic", "checkpoint.every=5"),
            ],
            [
                "optimizer.lr=1: job=generate does not use the group optimizer; leave optimizer.lr out",
                "schedule=constant: job=generate does not use",
                "data=synthetic: job=generate does not use",
                "checkpoint.every=5: job=generate writes no checkpoints",
            ],
        ),
        (
            [
                *("job=generate", "job.engine=echo", "job.tokenizer=bytes", "precision=bf16", "attention=eager"),
                *("compile=true", "model=llama_tiny", "model.weights=/", "model.num_hidden_layers=3"),
                *("job.top_k=3", "job.repetition_penalty=1.5", "job.no_repeat_ngram_size=2", "job.aging_s=1"),
            ],
            [
                "precision=bf16: job=generate job.engine=echo does not use the group precision",
                *("attention=eager: job=gen", "compile=true: job=gen"),
                "model.weights=/: job.engine=echo repeats prompts and computes nothing with a model; leave",
                *("model.num_hidden_layers=3: job.engine=echo", "job.top_k=3: job.engine=echo does not use it"),
                *("job.repetition_penalty=1.5: job.engine=echo", "job.no_repeat_ngram_size=2: job.engine=echo"),
                "job.aging_s=1: job.engine=echo",
            ],
        ),
        (
            ["job=serve", "job.engine=echo", "job.tokenizer=bytes", "job.warm_up=[[1,10]]"],
            ["job.warm_up=[[1,10]]: job.engine=echo does not use it"],
        ),
        (["job=evaluate", "activation=full", "checkpoint.at_end=true"], ["activation=full", "checkpoint.at_end=true"]),
        (["benchmark=activation"], ["benchmark=activation: job=train measures no benchmark; add job=benchmark"]),
        (
            ["job=benchmark", "benchmark=attention", "model.num_hidden_layers=1", "data.path=y", "backend.ranks=1"],
            ["model.num_hidden_layers=1", "data.path=y"],
        ),
        (
            ["job.sample_tokens=0", "job.sample_prompt=x"],
            ["job.sample_prompt=x: job.sample_tokens=0 generates no sample"],
        ),
        (
            ["job=verify", "schedule=constant", "parallel=zero3", "job.strategies=[ddp]"],
            ["parallel=zero3: job.strategies=ddp does not name run, the strategy of the run; leave parallel out"],
        ),
        (
            ["job=benchmark", "benchmark=collectives", "precision=bf16", "compile=true", "parallel=zero3"],
            [
                "precision=bf16: benchmark=collectives does not use the group precision",
                "compile=true: benchmark=collectives does not use",
                "parallel=zero3: benchmark=collectives does not measure the strategy of the run; leave parallel out",
            ],
        ),
        (
            ["job=generate", "job.tokenizer=bytes", "parallel=zero3", "job.max_batch_size=4", "job.echo_step_s=1"],
            [
                "parallel=zero3: each engine of job=generate holds the whole model",
                "job.max_batch_size=4: job.batching=continuous does not use it; leave job.max_batch_size out",
                "job.echo_step_s=1: it is for job.engine=echo, and job.engine=paged",
            ],
        ),
        (
            ["job=generate", "job.engine=echo", "job.tokenizer=bytes", "job.kv_cache_tokens=99", "job.bucket_size=32"],
            ["job.kv_cache_tokens=99: job.engine=echo does not use it"],
        ),
    ],
)
def test_an_option_without_effect_is_refused(refused, words, messages):
    said = refused(*words).strip().splitlines()
    assert len(said) == len(messages)
    for line, message in zip(said, messages, strict=True):
        assert message in line


def test_a_port_in_use(refused):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert f"backend.port={port}" in refused(f"backend.port={port}")


def test_a_run_directory_that_is_taken(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    assert "is not empty" in refused("run.dir=mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"


def test_a_run_directory_that_is_a_file(refused, tmp_path):
    (tmp_path / "runs").write_text("a file")
    assert "is a file" in refused()


@pytest.mark.skipif(not Path("/proc/sys/kernel").is_dir(), reason="needs a read-only file system: Linux's /proc")
def test_a_folder_that_is_not_writable(refused):
    assert "run.root" in refused("run.root=/proc/sys/kernel")


def test_a_checkpoint_of_another_model(refused, launch_in_process, tmp_path):
    folder = tmp_path / "old" / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    manifest = {
        "step": 10,
        "created": 0.0,
        "run_id": "x",
        "run_hash": "x",
        "architecture": {
            "family": "gpt2",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "hidden_size": 128,
            "max_position_embeddings": 256,
            "vocab_size": 2048,
        },
        "engine": "torch",
        "parallel": {"kind": "ddp", "bucket_mb": 25},
        "precision": "fp32",
        "world_size": 2,
    }
    write_manifest(folder, CheckpointManifest(**manifest))
    line = refused("checkpoint.resume=old")
    assert "layers is 2, this run's is 4" in line
    launch_in_process("checkpoint.resume=old", line.rpartition("; set ")[2].strip(), "dry_run=true").expect(0)
    line = refused("checkpoint.resume=old", "model=llama_tiny")
    assert "its family is gpt2, this run's is llama" in line
    assert "choose the model it was trained with, as " in line
    assert "step_00000010/model/config.json describes it" in line
    manifest["architecture"]["num_hidden_layers"] = 4
    write_manifest(folder, CheckpointManifest(**manifest))
    assert "step 10" in refused("checkpoint.resume=old", "job.steps=10")
    launch_in_process("checkpoint.resume=old", "dry_run=true").expect(0)


def test_a_dry_run_writes_nothing_and_imports_nothing_heavy(launch, tmp_path):
    before = set(tmp_path.iterdir())
    launch("+exp=zero3_gpt2xl", "dry_run=true").expect(0)
    assert set(tmp_path.iterdir()) == before


def test_help_teaches(launch_in_process):
    said = launch_in_process("--help").expect(0).stdout
    assert "+exp=zero3_gpt2xl dry_run=true" in said
    for verb in VERBS:
        assert verb in said
        assert "launch" in launch_in_process(verb, "--help").expect(0).stdout


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (None, ["odd.yaml cannot be read: is not a regular file"]),
        ("defaults:\n  - override /model: gpt2\n", ["does not begin with the line `# @package _global_`"]),
        ("# @package _global_\ndefaults:\n  - /exp: odd\n", ["includes itself in its defaults"]),
        ("# @package _global_\noptimizer: {kind: [adamw]}\n", ["optimizer.kind", "did you mean adamw?"]),
        ("# @package _global_\njob: {kind: {a: 1}}\n", ["job.kind", "is not known; choose from: benchmark"]),
        ("# @package _global_\nrun: 5\n", ["run=5", "is not a set of options"]),
        ("# @package _global_\nexp: {a: 1}\n", ["exp.a=1 (own/exp/odd.yaml:2): exp chooses experiments"]),
        ("# @package _global_\nexp: 5\n", ["exp=5 (own/exp/odd.yaml:2): exp chooses experiments"]),
    ],
    ids=[
        *("a FIFO", "no package", "itself", "a list for a kind", "a mapping for a kind", "a number for a group"),
        *("options below exp", "a number for exp"),
    ],
)
def test_an_experiment_that_is_none(launch_in_process, tmp_path, text, messages):
    file = tmp_path / "own" / "exp" / "odd.yaml"
    file.parent.mkdir(parents=True)
    if text is None:
        os.mkfifo(file)
    else:
        file.write_text(text)
    said = launch_in_process("plan", "--config-dir", "own", "+exp=odd").expect(2).stderr
    assert "Traceback" not in said
    for message in messages:
        assert message in said


def test_files_of_a_model_that_would_never_end(launch_in_process, tmp_path):
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    said = launch_in_process("plan", "model=hf", "model.name=model").expect(2).stderr
    assert "is not a regular file" in said
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "config.json").symlink_to("/dev/zero")
    assert "is not a regular file" in launch_in_process("plan", "model=hf", "model.name=model").expect(2).stderr


@pytest.mark.parametrize("verb", ["runs", "show", "diff", "status"])
def test_a_run_that_cannot_be_looked_at(launch_in_process, verb):
    """Python 3.11 raises for a path with a name that is too long as it does for a folder that is closed."""
    word = f"{'x' * 300}/run"
    said = launch_in_process(verb, word, *([word] if verb == "diff" else [])).expect(2).stderr
    assert "file systems allow 255" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("verb", ["show", "diff", "status"])
def test_a_path_that_is_no_run(launch_in_process, tmp_path, verb):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("/no/such/place")
    (tmp_path / "plain").mkdir()
    os.mkfifo(tmp_path / "pipe")
    reasons = {
        "loop": "leads back to itself",
        "dangling": "does not exist",
        "plain": "holds no run.yaml",
        "pipe": "neither",
    }
    for word, why in reasons.items():
        said = launch_in_process(verb, word, *([word] if verb == "diff" else [])).expect(2).stderr
        assert why in said
        assert "choose from" not in said
