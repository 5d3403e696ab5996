"""``model.weights=RUN`` and ``checkpoint.resume=RUN``: what the parent makes of ids, folders, ``@best``, ``@step``."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.checkpoint.locks import RemovalLock
from launcher.checkpoint.manifest import TrainingProgress, describe_checkpoint, write_manifest
from launcher.checkpoint.store import CheckpointStore, SavedCheckpoint
from launcher.config.checkpoint import Checkpoint
from launcher.config.compose import Composition, compose
from launcher.config.data.base import Corpus
from launcher.config.data.bpe import train_byte_level_bpe
from launcher.config.run import Run
from launcher.config.snapshot import save_run
from launcher.errors import ConfigError, ConfigErrors
from launcher.execution.prepare import prepare
from launcher.execution.run_references import resolve_run_references
from launcher.execution.saved_models import find_run_or_checkpoint
from launcher.execution.summary import closing_text
from launcher.execution.sweep import plan_sweep
from launcher.execution.validate import path_warnings, validate_machine
from launcher.planning.warnings import warnings_of_run
from launcher.protocol.plan import Host
from launcher.protocol.rundir import RunDir
from launcher.protocol.state_files import StoredPart, parts_metadata
from launcher.runs.state import continue_command, read_run_state
from launcher.utils.files import read_json, write_json
from launcher.utils.safetensors_header import TensorEntry, header_bytes
from launcher.utils.schema import to_tree
from tests.conftest import Launch, PlanOf

TRAINED = (
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    "model.max_position_embeddings=64",
    "model.vocab_size=300",
    "data.vocab_size=300",
)
ID = "20260101-120000-abcd"
Write = Callable[..., SavedCheckpoint]


def state_file(name: str, *, shape: tuple[int, ...], offset: int, rows: int) -> bytes:
    """Return a rank's file with some rows of one tensor, zeros."""
    part = StoredPart(name=name, shape=shape, sizes=(rows, *shape[1:]), offsets=(offset, *(0 for _ in shape[1:])))
    entry = TensorEntry(name="0", dtype="F32", shape=part.sizes)
    return header_bytes([entry], parts_metadata({"0": part})) + bytes(entry.num_bytes)


@functools.cache
def trained_run(words: tuple[str, ...]) -> Run:
    return compose((*TRAINED, *words)).run


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the checkpoint of a step of a run of ``TRAINED``; the current folder is ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def checkpoint(
        step: int,
        *words: str,
        run_id: str = ID,
        loss: float | None = None,
        ranks: int = 1,
        tokenizer: bool | str = True,
    ) -> SavedCheckpoint:
        run = trained_run(words)
        folder = tmp_path / "runs" / "gpt2_tiny" / run_id
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        save_run(run, folder / "run.yaml")
        store = CheckpointStore(folder / "checkpoints", Checkpoint(keep=0))
        pending = store.begin(step)
        (pending / "model").mkdir()
        (pending / "state").mkdir()
        for rank in range(ranks):
            rows = state_file("wte.weight", shape=(2 * ranks, step), offset=2 * rank, rows=2)
            (pending / "state" / f"rank_{rank:05d}.safetensors").write_bytes(rows)
        config = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": 300}
        write_json(pending / "model" / "config.json", config)
        if tokenizer:
            (pending / "model" / "tokenizer.json").write_text(tokenizer if isinstance(tokenizer, str) else "{}\n")
        (pending / "optimizer.pt").write_bytes(b"moments")
        about = describe_checkpoint(
            run,
            TrainingProgress(step=step, sequences=0, eval_loss=loss),
            world_size=2,
            plan={"run_id": run_id, "run_hash": "0" * 64},
        )
        return store.commit(about)

    return checkpoint


@functools.cache
def composed(*words: str) -> Composition:
    """Compose once for all tests: it takes a good part of a second."""
    return compose(words)


def resolved(*words: str) -> Run:
    """Resolve what ``words`` name, of which compositions that differ in nothing else are made once."""
    named = [word.partition("=") for word in words if word.startswith(("model.weights=", "checkpoint.resume="))]
    base = composed(*(word for word in words if not word.startswith(("model.weights=", "checkpoint.resume="))))
    run = base.run
    for option, _, value in named:
        group, _, field = option.partition(".")
        run = replace(run, **{group: replace(getattr(run, group), **{field: value})})
    return resolve_run_references(replace(base, run=run, overrides=words))


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        resolved(*words)
    return str(error.value)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_run_stands_for_the_weights_of_a_checkpoint(write: Write) -> None:
    for number, loss in ((10, 3.0), (20, 2.0), (30, None)):
        folder = write(number, loss=loss).folder.parent
    steps = {
        ID: 30,
        ID[:10]: 30,
        f"gpt2_tiny/{ID}": 30,
        f"runs/gpt2_tiny/{ID}": 30,
        f"runs/gpt2_tiny/{ID}/checkpoints": 30,
        f"runs/gpt2_tiny/{ID}/checkpoints/step_00000010": 10,
        f"runs/gpt2_tiny/{ID}/checkpoints/step_00000010/model": 10,
        f"{ID}@best": 20,
        f"runs/gpt2_tiny/{ID}@best": 20,
        f"{ID}@step_00000010": 10,
        f"{ID}@step_10": 10,
    }
    found = {word: resolved("job=generate", f"model.weights={word}").model.weights for word in steps}
    assert found == {word: str(folder / f"step_{step:08d}" / "model") for word, step in steps.items()}


@pytest.mark.parametrize(
    "words",
    [
        ("job=generate",),
        ("job=serve",),
        ("job=evaluate",),
        ("job=verify",),
        ("job=quantize", "quantization=int8_weight"),
        ("job=train",),
        ("job=benchmark", "benchmark=batching"),
    ],
)
def test_every_job_takes_the_model_and_the_tokenizer_of_the_run(write: Write, words: tuple[str, ...]) -> None:
    saved = write(10, "model.name=mine", "model.dropout=0.1")
    run = resolved(*words, f"model.weights={ID}", "model.quantization=none")
    trained = composed(*TRAINED, "model.name=mine", "model.dropout=0.1").run.model
    assert run.model == replace(trained, weights=f"{saved.folder}/model")
    assert run.run.name == "mine"
    assert to_tree(run.data)["tokenizer"] == "model"


def test_options_that_leave_the_architecture_alone_come_from_the_run_too(write: Write) -> None:
    saved = write(10)
    save_run(composed("model.dropout=0.1").run, saved.folder.parent.parent / "run.yaml")
    assert to_tree(resolved("job=train", f"model.weights={ID}").model)["dropout"] == 0.1
    assert to_tree(resolved("job=train", "model=gpt2_tiny", f"model.weights={ID}").model)["dropout"] == 0.0


def test_a_model_whose_folder_is_gone_is_that_of_the_checkpoint(write: Write) -> None:
    saved = write(10)
    save_run(composed("model=hf", "model.name=./gone/base").run, saved.folder.parent.parent / "run.yaml")
    run = resolved("job=generate", f"model.weights={ID}")
    assert (run.model.kind, run.model.name, run.model.weights) == ("hf", f"{saved.folder}/model", "pretrained")
    assert run.model.shape() == composed(*TRAINED).run.model.shape()
    assert run.run.name == "base"
    assert to_tree(run.data)["tokenizer"] == "model"


@pytest.mark.parametrize("snapshot", [None, b"{", b"- 1", b"\xff", b"!!python/object:os.system x"])
def test_a_checkpoint_without_its_run_says_itself_what_it_is_of(
    write: Write, snapshot: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = write(10)
    file = saved.folder.parent.parent / "run.yaml"
    file.unlink()
    if snapshot is not None:
        file.write_bytes(snapshot)
    run = resolved("job=generate", f"model.weights={saved.folder}")
    assert run.model.architecture() == composed(*TRAINED).run.model.architecture()
    assert ("run.yaml cannot be read" in capsys.readouterr().err) is (snapshot is not None)
    assert "its num_hidden_layers is 2, this run's is 12" in refused("model=gpt2", f"model.weights={saved.folder}")


def test_a_name_that_the_user_chose_stays_even_if_it_is_that_of_a_model(write: Write) -> None:
    write(10, "model.name=mine")
    assert resolved(f"model.weights={ID}").run.name == "mine"
    assert resolved("run.name=gpt2_tiny", f"model.weights={ID}").run.name == "gpt2_tiny"


def test_what_the_user_chose_stays(write: Write) -> None:
    saved = write(10)
    given = (*TRAINED, "model.name=other", "data.tokenizer=bpe", "run.name=named", f"model.weights={ID}")
    run = resolved("job=evaluate", *given)
    assert run.model == replace(composed(*given).run.model, weights=f"{saved.folder}/model")
    assert run.run.name == "named"
    assert to_tree(run.data)["tokenizer"] == "bpe"


def test_a_checkpoint_without_a_tokenizer_leaves_that_of_the_data(write: Write) -> None:
    write(10, tokenizer=False)
    assert to_tree(resolved("job=evaluate", f"model.weights={ID}").data)["tokenizer"] == "bpe"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model=gpt2",), "its num_hidden_layers is 2, this run's is 12"),
        (("model=llama_tiny",), "its family is gpt2, this run's is llama"),
        (("model.num_hidden_layers=3",), "its num_hidden_layers is 2, this run's is 3"),
        (("+exp=zero3_gpt2xl",), "its num_hidden_layers is 2, this run's is 48"),
    ],
)
def test_another_model_is_refused(write: Write, words: tuple[str, ...], said: str) -> None:
    write(10)
    message = refused(*words, f"model.weights={ID}")
    assert said in message
    assert "leave the model out" in message


NO_CHECKPOINT = {
    "nowhere": "is not a folder, and no run in runs begins with it",
    "2026": "2 runs in runs begin with it; write more of it",
    f"{ID}@step_7": "no complete checkpoint of step 7; it has @step_00000010",
    f"{ID}@best": "has a held-out loss",
    f"{ID}@worst": "write RUN@best or RUN@step_00000010",
    f"runs/gpt2_tiny/{ID}/checkpoints/step_00000010@best": "is already one checkpoint",
    "empty@best": "holds no complete checkpoint",
    "other@best": "other is neither a run nor a checkpoint",
}


def test_what_leads_to_no_checkpoint_is_refused(write: Write, tmp_path: Path) -> None:
    write(10)
    write(10, run_id="20260202-120000-efgh")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for option in ("model.weights", "checkpoint.resume"):
        for word, said in NO_CHECKPOINT.items():
            message = refused(f"{option}={word}")
            assert message.startswith(f"{option}={word}: ")
            assert said in message


@pytest.mark.parametrize("kind", ["zero3", "fsdp", "pipeline"])
def test_weights_of_any_strategy_are_taken(write: Write, kind: str) -> None:
    saved = write(10, f"parallel={kind}", ranks=2)
    run = resolved("job=generate", f"model.weights={ID}")
    assert run.model.weights == f"{saved.folder}/model"
    assert not list(run.model.validate_machine())
    (saved.folder / "state" / "rank_00001.safetensors").unlink()
    (error,) = run.model.validate_machine()
    assert "wte.weight of shape (4, 10) has 20 of 40 elements in these files" in error.why


def test_a_model_folder_without_its_checkpoint_has_no_weights(write: Write, tmp_path: Path) -> None:
    (write(10).folder / "model").rename(tmp_path / "model")
    (error,) = resolved(*TRAINED, "model.weights=./model").model.validate_machine()
    assert "holds no weights" in error.why


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    ten, twenty = write(10), write(20)
    damage(twenty.folder / "state" / "rank_00000.safetensors")
    damage(ten.folder / "optimizer.pt")  # which nothing reads here
    assert resolved(f"model.weights={ID}").model.weights == f"{ten.folder}/model"
    said = capsys.readouterr().err
    assert f"{twenty.folder} is damaged: the content of state/rank_00000.safetensors is not what was written" in said
    assert f"{ten.folder} is loaded instead" in said
    damage(ten.folder / "model" / "tokenizer.json")
    message = refused(f"model.weights={ID}")
    assert "no checkpoint is intact" in message
    assert "model/tokenizer.json" in message


def test_one_of_another_version_is_named_with_what_to_do(
    write: Write, launch_in_process: Launch, tmp_path: Path
) -> None:
    ten = write(10, loss=3.0)
    file = write(20, loss=1.0).folder / "manifest.json"
    write_json(file, {**read_json(file), "version": 4})
    said = f"runs/gpt2_tiny/{ID}/checkpoints/step_00000020/manifest.json has version 4, this launcher reads 3: "
    for place in ("", "@step_00000020", "/checkpoints/step_00000020", "/checkpoints/step_00000020/model"):
        word = f"runs/gpt2_tiny/{ID}{place}"
        for option in ("model.weights", "checkpoint.resume"):
            if option == "model.weights" or place.startswith("@"):  # the others are checked where the run is
                assert f"{option}={word}: {said}a newer launcher wrote it; update this launcher, or" in refused(
                    f"{option}={word}"
                )
        assert said in launch_in_process("export", word, "new").expect(2).stderr
    assert resolved(f"model.weights={ID}@best").model.weights == f"{ten.folder}/model", "of those that can be read"
    assert resolved(f"model.weights={ID}@step_10").model.weights == f"{ten.folder}/model"
    words = ("job=generate", "model=hf", f"model.name=runs/gpt2_tiny/{ID}/checkpoints/step_00000020/model")
    assert said in launch_in_process("plan", *words).expect(2).stderr
    assert not (tmp_path / "new").exists()
    assert file.exists()


def test_what_cannot_be_merged_is_refused(write: Write, launch_in_process: Launch, tmp_path: Path) -> None:
    write(10)
    saved = write(10, "adapter=lora", run_id="adapted")

    def refused_merge(word: str) -> str:
        return launch_in_process("export", word, "new", "merge=true").expect(2).stderr

    assert "holds all weights of a model, and no adapter to merge; leave it out" in refused_merge(ID)
    save_run(trained_run(("adapter=lora", "job.seed=5")), saved.folder.parent.parent / "run.yaml")
    assert "put back the weights that it was trained on" in refused_merge("adapted")
    kept = tmp_path / "kept" / "checkpoints" / saved.folder.name
    shutil.copytree(saved.folder, kept)
    assert f"{kept} is not in its run, whose run.yaml names the weights to merge into" in refused_merge(str(kept))


@pytest.mark.parametrize("code", [0, 3])
def test_an_export_says_what_it_wrote_once_it_is_written(
    write: Write, launch_in_process: Launch, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write(10)
    monkeypatch.setattr("launcher.cli.export.run_in_foreground", lambda _: code)
    said = launch_in_process("export", ID, "new").expect(code).stdout
    assert said.startswith(f"exported step 10 of runs/gpt2_tiny/{ID} to new\n" if code == 0 else "")
    assert bool(said) == (code == 0)


def test_what_a_plan_or_a_sweep_has_chosen_is_kept(write: Write) -> None:
    saved = write(10, "job.sequence_length=16")
    words = (*TRAINED, "job.sequence_length=16", "job.steps=20", f"checkpoint.resume={ID}")

    def is_kept() -> bool:
        with RemovalLock(saved.folder) as lock:
            return not lock.acquire()

    prepared = prepare(compose(words))
    assert is_kept()
    prepared.locks.close()
    assert not is_kept()
    _, trials = plan_sweep([*words, "job.seed=1,2"], config_dir=None)
    assert is_kept()
    (locks,) = {trial.locks for trial in trials}
    locks.close()
    assert not is_kept(), "no trial has a file of its own open"


def test_one_that_is_damaged_is_refused_where_the_user_named_it(write: Write) -> None:
    write(10)
    damage(write(20).folder / "state" / "rank_00000.safetensors")
    for place in ("@step_00000020", "/checkpoints/step_00000020", "/checkpoints/step_00000020/model"):
        assert "no checkpoint is intact" in refused(f"model.weights=runs/gpt2_tiny/{ID}{place}")


def test_a_run_that_quantized_stands_for_its_weights(tmp_path: Path, write: Write) -> None:
    saved = write(10)
    (tmp_path / "packed").mkdir()
    save_run(composed(*TRAINED, "job=quantize", "quantization=int8_weight").run, tmp_path / "packed" / "run.yaml")
    (saved.folder / "model").rename(tmp_path / "packed" / "model")
    run = resolved("job=generate", "model.weights=packed")
    assert run.model.weights == str(tmp_path / "packed" / "model")
    assert run.model.shape() == composed(*TRAINED).run.model.shape()


def test_other_weights_are_left_as_they_are(write: Write) -> None:
    (write(10).folder / "model").rename("plain")
    for weights in ("random", "pretrained", "./nowhere", "/nowhere", "plain"):
        assert resolved("model=smollm2_135m", f"model.weights={weights}").model.weights == weights


def test_a_folder_of_a_model_says_which_model_it_is(tmp_path: Path, write: Write) -> None:
    exported = tmp_path / "exported"
    (write(10).folder / "model").rename(exported)
    run = resolved("job=generate", "model.weights=exported", "model.quantization=int8_weight")
    assert (run.model.kind, run.model.name, run.model.weights) == ("hf", "exported", "pretrained")
    assert (run.model.quantization, run.run.name) == ("int8_weight", "exported")
    assert resolved("job=evaluate", "model.weights=exported").data.tokenizer == "model"
    assert resolved("job=evaluate", "model=gpt2_tiny", "model.weights=exported").model.kind == "gpt2"


@pytest.mark.parametrize(
    "words", [("model=hf", "model.name=plain", "model.weights=pretrained"), ("model.weights=plain",)]
)
def test_the_base_of_an_adapter_is_found_from_any_folder(write: Write, tmp_path: Path, words: tuple[str, ...]) -> None:
    (write(10).folder / "model").rename("plain")
    model = resolved("job=train", "adapter=lora", *words).model
    assert (model.kind, model.name, model.weights) == ("hf", str(tmp_path / "plain"), "pretrained")
    assert resolved("job=train", *words).model.name == "plain"


def test_resume_takes_a_run_id_and_keeps_the_run_so_that_ranks_can_take_the_one_before(write: Write) -> None:
    ten, twenty = write(10, loss=1.0), write(20, loss=2.0)
    run_dir = ten.folder.parent.parent
    for word, found in ((ID, run_dir), (f"{ID}@best", ten.folder), (f"{run_dir}@step_20", twenty.folder)):
        assert resolved(f"checkpoint.resume={word}").checkpoint.resume == str(found)


def test_runs_of_this_machine_are_not_sent_to_a_cluster_that_does_not_see_them(write: Write) -> None:
    write(10)
    there = ("job=train", "backend=kubernetes", "backend.image=x", "backend.claim=y")
    for option, value in (("model.weights", ID), ("checkpoint.resume", f"{ID}@best"), ("model.weights", "runs/x")):
        assert "as an absolute path on its hosts" in refused(*there, f"{option}={value}")
    assert resolved(*there, "model.weights=/pods/see/this").model.weights == "/pods/see/this"


@pytest.mark.parametrize(
    "words",
    [
        ("job=generate",),
        ("job=serve",),
        ("job=verify", "parallel=ddp"),
        ("job=quantize", "quantization=int8_weight", "parallel=single"),
        ("job=benchmark", "benchmark=batching"),
        ("job=benchmark", "benchmark=activation"),
    ],
)
def test_resume_is_refused_where_nothing_is_continued(plan_of: PlanOf, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigErrors) as mistakes:
        plan_of(*words, "checkpoint.resume=elsewhere")
    (message,) = [str(error) for error in mistakes.value.errors if error.option == "checkpoint.resume"]
    assert "does not continue a training run" in message


def test_the_plan_says_where_a_learning_rate_jumps(write: Write, launch_in_process: Launch) -> None:
    saved = write(10, "job.steps=10", "job.sequence_length=16")
    write_manifest(saved.folder, replace(saved.manifest, lr=1e-4))
    words = ("resume", str(saved.folder.parent.parent), "job.steps=500", "dry_run=true")
    assert "the learning rate jumps from 0.0001 (step 10" in launch_in_process(*words).expect(0).stdout


def test_a_run_resumes_under_another_strategy_with_its_batch(write: Write, launch_in_process: Launch) -> None:
    words = ("parallel=fsdp", "backend.ranks=2", "job.micro_batch=4", "job.sequence_length=16", "job.steps=20")
    folder = write(10, *words, ranks=2, loss=2.5).folder.parent.parent
    short = f"runs/gpt2_tiny/{ID}"
    other = ("resume", str(folder), "parallel=single", "backend.ranks=1", "precision=bf16", "dry_run=true")
    plan = launch_in_process(*other, "--json").expect(0)
    tree = json.loads(plan.stdout)
    said = f"step 10 of {short}, fsdp on 2 ranks → single on 1 rank, fp32 → bf16 (best: step 10, loss 2.5000)"
    assert tree["details"]["checkpoint"] == said
    assert tree["work"]["batch"] == {"micro_batch": 4, "gradient_accumulation_steps": 2, "data_parallel": 1}
    assert said in launch_in_process(*other).expect(0).stdout
    changed = launch_in_process(*other, "job.global_batch=4", "--json").expect(0)
    assert "from 8 to 4 sequences after step 10" in str(json.loads(changed.stdout)["warnings"])


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("steps", [10, 20])
def test_the_command_advised_after_a_training_works(
    write: Write, launch_in_process: Launch, tokenizer: bool, steps: int
) -> None:
    """A complete run has nothing to resume: its weights generate, or more steps are needed."""
    words = ("parallel=fsdp", "backend.ranks=2", "job.sequence_length=16", "job.sample_tokens=0", "job.steps={steps}")
    words = tuple(word.format(steps=steps) for word in words)
    folder = write(10, *words, ranks=2, tokenizer=tokenizer).folder.parent.parent
    write_json(folder / "plan.json", {"run_id": ID, "job": "train", "work": {"num_steps": steps}})
    write_json(folder / "result.json", {"status": "completed", "exit_code": 0, "metrics": {}})
    state = read_run_state(RunDir(folder))
    short = f"runs/gpt2_tiny/{ID}"
    for status in ("completed", "preempted"):
        write_json(folder / "result.json", {"status": status, "exit_code": 0, "metrics": {}})
        command = continue_command(replace(state, status=status))
        assert command is not None
        is_complete = status == "completed" or steps == 10
        if is_complete and tokenizer:
            line = closing_text({"status": status, "metrics": {}}, RunDir(folder), elapsed_s=1.0).splitlines()[-1]
            assert line == f"model: launch chat {short}, or launch job=generate|serve|evaluate model.weights={short}"
            assert command == f"launch job=generate model.weights={short}"
            assert resolved(*shlex.split(command)[1:]).model.weights.endswith("step_00000010/model")
        else:
            more = " job.steps=20" if (status, steps) == ("completed", 10) else ""
            assert command == f"launch resume {short}{more}"
            launch_in_process(*shlex.split(command)[1:], "dry_run=true").expect(0)


def test_the_best_checkpoint_is_named(write: Write, launch_in_process: Launch, tmp_path: Path) -> None:
    for step, loss in ((10, 2.0), (20, 3.0)):
        folder = write(step, "job.steps=20", loss=loss).folder.parent.parent
    write_json(folder / "plan.json", {"run_id": ID, "job": "train", "work": {"num_steps": 20}})
    write_json(folder / "result.json", {"status": "completed", "exit_code": 0, "metrics": {}})
    line = closing_text({"status": "completed", "metrics": {}}, RunDir(folder), elapsed_s=1.0).splitlines()[-1]
    assert line.endswith(f"model.weights=runs/gpt2_tiny/{ID} (@best: step 10, loss 2.0000)")
    said = "steps 20, 10; best: step 10, loss 2.0000"
    assert said in launch_in_process("status", ID).expect(0).stdout
    assert json.loads(launch_in_process("status", ID, "--json").expect(0).stdout)["best_checkpoint"] == 10
    launch_in_process("report", ID).expect(0)
    assert said in (folder / "report.html").read_text()


OTHER_TEXT = "other words, of which no tokenizer of the first text knows the numbers. " * 200


@pytest.fixture
def texts(tmp_path: Path) -> None:
    """Two texts in the current folder, and the words of a run on the first."""
    (tmp_path / "one.txt").write_text("Some words of the first text, with tokens of its own. " * 200)
    (tmp_path / "other.txt").write_text(OTHER_TEXT)


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("job", ["train", "evaluate"])
@pytest.mark.parametrize("resume", [ID, "auto"])
def test_the_tokenizer_of_a_checkpoint_stays_on_other_text(write: Write, job: str, resume: str) -> None:
    """A BPE trained on the other text has other token numbers than those that the weights know."""
    folder = write(10, "data=text", "data.path=one.txt").folder.parent.parent
    words = (f"job={job}", *TRAINED[:-1], f"run.dir={folder}", f"checkpoint.resume={resume}")
    same = resolved(*words, "data=text", "data.path=one.txt", "data.vocab_size=300")
    assert to_tree(same.data)["tokenizer"] == "bpe", "which the same text gives again"
    other = resolved(*words, "data=text", "data.path=other.txt")
    assert to_tree(other.data)["tokenizer"] == "checkpoint"
    assert not _tokenizer_errors(other)
    chosen = resolved(*words, "data=text", "data.path=other.txt", "data.tokenizer=bpe")
    assert to_tree(chosen.data)["tokenizer"] == "bpe", "ranks refuse to load the checkpoint with it"
    again = replace(other, run=replace(other.run, dir=str(folder)), checkpoint=replace(other.checkpoint, resume="auto"))
    assert to_tree(resolve_run_references(_composition(again)).data)["tokenizer"] == "checkpoint"


@pytest.mark.usefixtures("texts")
def test_another_tokenizer_is_refused_where_a_run_resumes(write: Write, tmp_path: Path) -> None:
    known = train_byte_level_bpe([Path("one.txt").read_text()], vocab_size=300)
    saved = write(10, "data=text", "data.path=one.txt", tokenizer=known.to_str())
    (tmp_path / "foreign").mkdir()
    train_byte_level_bpe([OTHER_TEXT], vocab_size=300).save("foreign/tokenizer.json")
    (tmp_path / "more").mkdir()
    known.add_tokens(["<more>"])
    known.save("more/tokenizer.json")
    words = ("job=train", *TRAINED[:-1], "data=text", "data.path=other.txt", f"checkpoint.resume={ID}")
    for tokenizer in ("bpe", "./foreign"):
        (error,) = _tokenizer_errors(resolved(*words, f"data.tokenizer={tokenizer}"))
        assert f"{saved.folder}, which the run resumes from, was trained with another tokenizer" in error.why
        assert error.fix.startswith("set data.tokenizer=checkpoint, or ")
    for tokenizer in ("checkpoint", "./more"):
        assert not _tokenizer_errors(resolved(*words, f"data.tokenizer={tokenizer}"))
    (tmp_path / "copy.txt").write_text(Path("one.txt").read_text())
    assert not _tokenizer_errors(resolved(*words[:-2], "data.path=copy.txt", words[-1], "data.tokenizer=bpe"))


@pytest.mark.usefixtures("texts")
def test_another_size_of_the_tokenizer_is_refused_where_a_run_resumes(write: Write) -> None:
    """The smaller of two vocabularies of one text is the beginning of the larger."""
    known = train_byte_level_bpe([Path("one.txt").read_text()], vocab_size=280)
    write(10, "data=text", "data.path=one.txt", tokenizer=known.to_str())
    words = ("job=train", *TRAINED[:-1], "data=text", "data.path=one.txt", f"checkpoint.resume={ID}")
    for size in (270, 290):
        assert _tokenizer_errors(resolved(*words, "data.tokenizer=bpe", f"data.vocab_size={size}"))
    assert not _tokenizer_errors(resolved(*words, "data.tokenizer=bpe", "data.vocab_size=280"))


@pytest.mark.usefixtures("texts")
def test_the_tokenizer_of_a_long_text_is_compared_where_its_tokens_are_cached(write: Write, tmp_path: Path) -> None:
    known = train_byte_level_bpe([Path("one.txt").read_text()], vocab_size=280)
    write(10, "data=text", "data.path=one.txt", tokenizer=known.to_str())
    Path("long.txt").write_text(OTHER_TEXT * (3 * (1 << 20) // len(OTHER_TEXT)))
    words = ("job=train", *TRAINED[:-1], "data=text", "data.path=long.txt", f"data.cache={tmp_path}/tokens")
    words = (*words, f"checkpoint.resume={ID}", "data.tokenizer=bpe")
    run = resolved(*words, "data.vocab_size=280")
    assert not _tokenizer_errors(run), "the ranks compare them"
    assert _tokenizer_errors(resolved(*words, "data.vocab_size=279")), "the checkpoint's is larger"
    assert isinstance(run.data, Corpus)
    folder = run.data.token_cache(run.data.trained_tokenizer)
    folder.mkdir(parents=True)
    train_byte_level_bpe([OTHER_TEXT], vocab_size=280).save(str(folder / "tokenizer.json"))
    assert _tokenizer_errors(run)
    known.save(str(folder / "tokenizer.json"))
    assert not _tokenizer_errors(run)


@pytest.mark.usefixtures("texts")
def test_the_default_text_is_short_enough_to_compare(write: Write) -> None:
    known = train_byte_level_bpe([Path("one.txt").read_text()], vocab_size=300)
    write(10, "data=text", "data.path=one.txt", tokenizer=known.to_str())
    words = ("job=train", *TRAINED[:-1], "data=text", f"checkpoint.resume={ID}", "data.tokenizer=bpe")
    assert _tokenizer_errors(resolved(*words, "data.vocab_size=300"))


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_a_run_that_resumes_in_kubernetes_keeps_the_tokenizer_of_the_checkpoint(job: str) -> None:
    there = ("backend=kubernetes", "backend.image=x", "backend.claim=y")
    step = "checkpoint.resume=/claim/runs/x/checkpoints/step_00000010"
    chosen = functools.partial(lambda *words: to_tree(resolved(f"job={job}", *there, *words).data)["tokenizer"])
    assert chosen(step) == "checkpoint"
    assert chosen(step, "data.tokenizer=bpe") == "bpe"
    assert chosen(step, "data.vocab_size=300") == "bpe", "the tokens of a run on the same text"
    assert chosen() == "bpe"
    assert chosen("checkpoint.resume=auto", "run.dir=/claim/runs/x") == "bpe"


def _tokenizer_errors(run: Run) -> list[ConfigError]:
    errors = validate_machine(run, Path(run.run.dir or "."), hosts=[Host(name="a", slots=2, cores=1, memory_bytes=1)])
    return [error for error in errors if error.option == "data.tokenizer"]


def _composition(run: Run) -> Composition:
    return Composition(run=run, tree={}, sweep=None, overrides=())


def test_a_model_without_a_name_is_left_to_the_weights() -> None:
    with pytest.raises(ConfigErrors) as mistakes:
        compose(("model=hf", f"model.weights={ID}"))
    (error,) = mistakes.value.errors
    assert error.option == "model.name"
    assert "leave model out" in error.fix


@pytest.mark.usefixtures("texts")
def test_a_tokenizer_of_a_checkpoint_needs_one(write: Write) -> None:
    write(10)
    for words in ((), ("job=generate", f"model.weights={ID}")):
        assert "the run does not resume from a checkpoint" in refused(*words, "data.tokenizer=checkpoint")


@pytest.mark.usefixtures("texts")
def test_a_vocabulary_is_sized_only_where_it_is_trained(write: Write) -> None:
    saved = write(10, "data=text", "data.path=one.txt")
    for words in (
        ("job=evaluate", f"model.weights={ID}"),
        ("job=evaluate", f"model.weights={saved.folder}/model", "data.tokenizer=model"),
        ("job=train", f"checkpoint.resume={ID}", "data=text", "data.path=other.txt"),
    ):
        with pytest.raises((ConfigError, ConfigErrors), match=r"data.vocab_size=300.* has its own vocabulary"):
            resolved(*words, "data.vocab_size=300")


def test_a_folder_of_a_damaged_checkpoint_is_refused_under_every_option(write: Write) -> None:
    folder = write(10).folder / "model"
    choices = {
        "model.name": ("job=evaluate", "model=hf", f"model.name={folder}", "data.tokenizer=bpe"),
        "data.tokenizer": ("job=evaluate", *TRAINED[:-1], f"data.tokenizer={folder}"),
        "job.tokenizer": ("job=generate", *TRAINED[:-1], f"job.tokenizer={folder}"),
    }
    runs = {option: compose(words).run for option, words in choices.items()}
    hosts = [Host(name="a", slots=2, cores=1, memory_bytes=1)]

    def refused_options() -> list[str]:
        return [
            option
            for option, run in runs.items()
            for error in validate_machine(run, Path("new"), hosts=hosts)
            if error.option == option and "is of a damaged checkpoint: the content of " in error.why
        ]

    assert refused_options() == []
    damage(folder.parent / "state" / "rank_00000.safetensors")
    assert refused_options() == ["model.name"]
    damage(folder / "tokenizer.json")
    assert refused_options() == list(choices)


@pytest.mark.parametrize("job", ["generate", "serve", "quantize", "evaluate"])
def test_a_tokenizer_that_the_weights_do_not_know_is_warned_of(write: Write, tmp_path: Path, job: str) -> None:
    folder = write(10).folder / "model"
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "foreign").mkdir()
    write_json(tmp_path / "foreign" / "tokenizer.json", {"model": {"vocab": {"a": 0}}})
    extra = ("quantization=int8_weight", "parallel=single") if job == "quantize" else ()
    option = "data.tokenizer" if job == "evaluate" else "job.tokenizer"
    known = {"model": True, "./same": True, "./foreign": False}
    known["bpe" if job == "evaluate" else "bytes"] = False
    for choice, is_known in known.items():
        for weights in (ID, "random"):
            run = resolved(f"job={job}", *extra, f"{option}={choice}", f"model.weights={weights}")
            lines = [line for line in warnings_of_run(run, [], None) if "were trained with the token ids" in line]
            expected = [] if is_known or weights == "random" else [f"{option}={choice}"]
            assert [line.partition(":")[0] for line in lines] == expected


def test_a_folder_of_this_machine_is_named_where_hosts_have_disks_of_their_own() -> None:
    run = composed("backend=ssh").run
    run = replace(run, model=replace(run.model, weights="/here/model"))
    remote = Host(name="node1", slots=1, cores=1, memory_bytes=1, ssh_destination="node1")
    assert list(path_warnings(run, [remote])) == [
        "model.weights=/here/model is a folder of this machine: every host needs it at the same path"
    ]
    assert not list(path_warnings(replace(run, model=composed("backend=ssh").run.model), [remote]))
    assert not list(path_warnings(replace(run, backend=composed().run.backend), [replace(remote, ssh_destination="")]))


@pytest.mark.parametrize(
    ("trained", "resumed", "why"),
    [
        (True, ("data=synthetic",), "was trained on text"),
        (False, (), "was trained on data=synthetic"),
    ],
)
def test_a_checkpoint_goes_on_with_tokens_that_it_knows(
    write: Write, trained: bool, resumed: tuple[str, ...], why: str
) -> None:
    sizes = TRAINED[:4]
    write(10, *(() if trained else ("data=synthetic",)), tokenizer=trained)
    with pytest.raises(ConfigError, match=why):
        resolve_run_references(compose((*sizes, *resumed, f"checkpoint.resume={ID}")))
    fitting = () if trained else ("data=synthetic",)
    resolve_run_references(compose((*sizes, *fitting, f"checkpoint.resume={ID}")))


def test_weights_trained_on_made_up_sequences_have_no_tokenizer(write: Write, launch_in_process: Launch) -> None:
    write(10, "data=synthetic", tokenizer=False)
    said = launch_in_process("plan", "job=generate", f"model.weights={ID}").expect(2).stderr
    assert "step_00000010 holds no tokenizer: it was trained on data=synthetic; set job.tokenizer=bytes" in said
    assert "openai-community" not in said
    run = resolved("job=evaluate", "data=synthetic", "job.sequence_length=32", f"model.weights={ID}")
    assert not [line for line in warnings_of_run(run, [], None) if "mean nothing" in line]


def test_a_run_in_the_place_of_a_model_is_recognised(write: Write, launch_in_process: Launch) -> None:
    saved = write(10)
    run = f"runs/gpt2_tiny/{ID}"
    for place in (run, f"{run}/checkpoints/{saved.folder.name}"):
        said = launch_in_process("plan", "job=generate", "model=hf", f"model.name={place}").expect(2).stderr
        assert f"model.name={place}: is a run or a checkpoint, not a model; set model.weights={place}" in said
    said = launch_in_process("plan", "job=generate", "model=hf", f"model.name={ID}").expect(2).stderr
    assert f"model.name={ID}: is the id of a run, not a name on the hub (org/model); set model.weights={ID}" in said
    said = launch_in_process("plan", "job=generate", "model.weights=runs/gpt2_tiny").expect(2).stderr
    assert f"model.weights=runs/gpt2_tiny: holds runs, not a model; set model.weights={run}" in said
    launch_in_process("plan", "job=generate", "job.tokenizer=bytes", f"model.weights={run}").expect(0)


def test_a_link_to_a_checkpoint_is_the_checkpoint_in_its_run(write: Write, tmp_path: Path) -> None:
    folder = write(10).folder
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(folder)
    assert find_run_or_checkpoint(str(link), tmp_path / "runs", option="run") == folder
