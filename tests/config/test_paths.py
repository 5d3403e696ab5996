"""Paths that cannot be looked at: one message that names the option, exit 2, whatever the option."""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from launcher.cli.parser import parse
from launcher.config.compose import compose
from launcher.config.paths import path_fields
from launcher.config.registry import KINDS, component_class
from launcher.errors import ConfigError, ConfigErrors
from launcher.execution.prepare import prepare
from launcher.execution.validate_inputs import validate_inputs
from launcher.protocol.rundir import RunDir
from launcher.utils.files import home_folder
from launcher.utils.schema import defaults

OPTIONS = {
    "data.path": ["data.path="],
    "data.cache": ["data.cache="],
    "data.image_folder": ["data=auto", "data.image_folder="],
    "data.chat_template": ["data=auto", "data.chat_template="],
    "data.eval_path": ["data=auto", "data.eval_path="],
    "data.tokenizer": ["data.tokenizer="],
    "data.files": ["data=hf", "data.path=json", "data.files=[{}]"],
    "model.weights": ["model.weights="],
    "model.name": ["model=hf", "run.name=x", "model.name="],
    "model.adapter": ["model.adapter="],
    "checkpoint.resume": ["checkpoint.resume="],
    "run.root": ["run.root="],
    "run.dir": ["run.dir="],
    "parallel.nvme_path": ["parallel=zero_infinity", "parallel.nvme_path="],
    "job.chat_template": ["job=serve", "job.chat_template="],
    "job.adapters.a": ["job=serve", "job.adapters.a="],
    "job.input": ["job=generate", "job.format=text", "job.input="],
    "job.output": ["job=generate", "job.output="],
    "job.eval_tasks": ["data=text", "job.eval_tasks=[{}]"],
    "job.eval_sets.a": ["job=evaluate", "data=text", "job.eval_sets={{a: {}}}"],
    "job.tokenizer": ["job=serve", "job.tokenizer="],
    "job.api_keys_file": ["job=serve", "job.api_keys_file="],
    "job.vllm_python": ["job=serve", "job.engine=vllm", "job.vllm_python="],
    "backend.hostfile": ["backend=ssh", "backend.hostfile="],
    "backend.image": ["backend=slurm", "backend.container=apptainer", "backend.image="],
    "backend.ssh_config": ["backend=ssh", "backend.ssh_config="],
    "deploy.out": ["deploy=kubernetes", "deploy.image=x", "deploy.out="],
    "benchmark.tokenizer": ["job=benchmark", "benchmark=batching", "benchmark.tokenizer="],
    "benchmark.tasks": ["job=benchmark", "benchmark=lm_eval", "benchmark.tasks=[{}]"],
    "benchmark.include_path": ["job=benchmark", "benchmark=lm_eval", "benchmark.include_path=[{}]"],
    "benchmark.trace": ["job=benchmark", "benchmark=serving", "benchmark.trace="],
}
"""Words before the one that takes the path. ``backend.python`` is a path of the hosts."""


def words_for(option, value):
    *before, last = OPTIONS[option]
    return [*before, last.format(f"'{value}'") if "{}" in last else last + value]


def refused(words):
    with pytest.raises(ConfigErrors) as caught:
        prepare(compose(words))
    return [str(error) for error in caught.value.errors]


def test_every_option_that_holds_a_path_is_tried_here():
    marked = {
        f"{group}.{name}"
        for group, kinds in KINDS.items()
        for kind in kinds
        for name in path_fields(component_class(group, kind))
    }
    assert {*marked, "run.root", "run.dir"} - {"backend.python"} == {option.removesuffix(".a") for option in OPTIONS}


_IN_CONTAINERS = ("model_path", "model_subpath")
_OF_LOAD_BALANCERS = ("tls_certificate_file", "tls_key_file", "temporary_folder", "log_folder")
ELSEWHERE = {f"deploy.{name}" for name in (*_IN_CONTAINERS, *_OF_LOAD_BALANCERS)}
"""Paths in containers and on the hosts of load balancers, which this machine cannot look at."""


def test_options_whose_names_speak_of_files_are_marked():
    """A new option is marked as a path, or its name says otherwise."""
    named = re.compile("path|file|folder|dir$|output$|input$|trace$|tokenizer")
    for group, kinds in KINDS.items():
        for kind in kinds:
            cls = component_class(group, kind)
            texts = {name for name, value in defaults(cls).items() if value is None or isinstance(value, str)}
            found = {f"{group}.{name}" for name in texts - path_fields(cls) if named.search(name)}
            assert not found - ELSEWHERE


TOO_LONG = "y" * 300


@pytest.mark.parametrize("option", OPTIONS)
def test_a_name_that_no_file_system_takes(option):
    (said,) = refused(words_for(option, f"/tmp/{TOO_LONG}"))
    assert said == f"{option}=/tmp/{TOO_LONG}: a name in it has 300 bytes, and file systems allow 255; " + (
        f"set {option} to another path"
    )


def test_a_long_name_without_a_folder():
    (said,) = refused(["model=hf", "run.name=x", f"model.name={TOO_LONG}"])
    assert said.startswith(f"model.name={TOO_LONG}: a name in it has 300 bytes")


@pytest.fixture(scope="module")
def folder():
    """Return a folder of paths that lead nowhere, below folders that every user may enter, unlike pytest's own."""
    made = Path(tempfile.mkdtemp(prefix="paths-"))
    made.chmod(0o755)
    (made / "loop").symlink_to("loop")
    (made / "dangling").symlink_to("nowhere")
    (made / "file").touch()
    os.mkfifo(made / "pipe")
    (made / "closed").mkdir()
    (made / "closed" / "text.txt").touch()
    (made / "secret.txt").touch()
    for private in (made / "closed", made / "secret.txt"):
        private.chmod(0)
    yield made
    (made / "closed").chmod(0o700)
    shutil.rmtree(made)


NOWHERE = {
    "loop/x": "it leads through a link that leads back to itself",
    "dangling": "dangling is a link to nowhere, which does not exist",
    "dangling/below": "dangling is a link to nowhere, which does not exist",
    "file/below": "file is a file, not a folder",
    "pipe": "pipe is neither a file nor a folder",
    "a/" * 2100: "bytes, and the system allows 4095",
}


@pytest.mark.parametrize("path", NOWHERE, ids=lambda path: path[:20])
def test_other_paths_that_lead_nowhere(folder, path):
    (said,) = refused([f"model.weights={folder}/{path}"])
    assert said.startswith(f"model.weights={folder}/{path}: ")
    assert NOWHERE[path] in said


def test_all_are_reported_at_once_and_patterns_by_their_folder(folder):
    errors = refused([f"data.path=['{folder}/file/*.txt','{folder}/loop/**/a.txt']", f"run.root={folder}/pipe"])
    assert [said.partition("=")[0] for said in errors] == ["data.path", "data.path", "run.root"]


def test_an_empty_path_and_a_name_that_is_too_long():
    assert refused(["job=generate", "job.tokenizer=  "])[0].startswith("job.tokenizer='  ': is empty, not a path; ")
    assert refused(["data.cache="])[0].startswith("data.cache='': is empty, not a path; ")
    (said,) = refused([f"run.name={TOO_LONG}"])
    assert said.startswith(f"run.name={TOO_LONG}: a name in it has 300 bytes")
    assert refused(["run.name= "])[0].startswith("run.name= : is empty; set run.name=mine")


def test_a_file_as_the_folder_of_all_runs(folder):
    (said,) = refused([f"run.root={folder}/file"])
    assert said == f"run.root={folder}/file: {folder}/file is a file, not a folder; set run.root to a folder"


@pytest.mark.parametrize("path", ["file", "missing"])
def test_a_tokenizer_that_is_no_folder(folder, path):
    (said,) = refused(["job=generate", f"job.tokenizer={folder}/{path}"])
    assert said.startswith(f"job.tokenizer={folder}/{path}: ")
    assert said.endswith("give a folder that holds a tokenizer, or set job.tokenizer=bytes")


def test_advice_for_a_model_folder_names_words_that_the_option_takes(folder):
    (said,) = refused(["model=hf", f"model.name={folder}/file"])
    assert said.endswith("or a name on the hub (org/model)")
    (said,) = refused([f"model.weights={folder}/file"])
    assert said.endswith("or model.weights=random")


def test_a_nul_character_from_a_file(tmp_path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "mine.yaml").write_text('# @package _global_\ndata:\n  path: "a\\0b"\n', encoding="utf-8")
    with pytest.raises(ConfigErrors, match=r"data\.path='a\\x00b': holds a NUL character"):
        prepare(compose(["+exp=mine"], config_dir=tmp_path))


@contextlib.contextmanager
def as_another_user():
    """Give up root's privileges for a while; any other user has none to give up."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("closed/text.txt", "closed cannot be opened by this user (permission denied)"),
        ("closed/x/y/z.txt", "closed cannot be opened by this user (permission denied)"),
        ("closed/*.txt", "closed cannot be read by this user (permission denied)"),
        ("secret.txt", "secret.txt cannot be read by this user (permission denied)"),
    ],
)
def test_paths_without_permission(folder, path, why):
    for option in ("data.path", "model.weights"):
        with pytest.raises(ConfigErrors) as caught, as_another_user():
            prepare(compose([f"{option}={folder}/{path}"]))
        (said,) = map(str, caught.value.errors)
        assert said.startswith(f"{option}={folder}/{path}: {folder}/")
        assert why in said


@pytest.mark.parametrize("verb", ["status", "logs", "report", "cancel", "benchmark", "resume", "rerun"])
def test_verbs_that_take_a_run(launch_in_process, verb):
    words = ["compare", f"/tmp/{TOO_LONG}", "x"] if verb == "benchmark" else [f"/tmp/{TOO_LONG}"]
    ended = launch_in_process(verb, *words)
    assert ended.returncode == 2
    assert "a name in it has 300 bytes" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_flags_that_take_a_folder(launch_in_process):
    with pytest.raises(ConfigError, match=r"^--config-dir=/tmp/y+: a name in it has 300 bytes"):
        parse("", ["--config-dir", f"/tmp/{TOO_LONG}"])
    assert launch_in_process("runs", "--root", f"/tmp/{TOO_LONG}").returncode == 2
    assert launch_in_process("show", f"data.path=/tmp/{TOO_LONG}").returncode == 0  # no path, but overrides


@pytest.mark.parametrize("option", OPTIONS)
def test_the_home_of_an_unknown_user(option):
    errors = [line for line in refused(words_for(option, "~no-such-user/x")) if option in line]
    assert len(errors) == 1
    assert f"{option}=~no-such-user/x" in errors[0]
    assert "there is no user no-such-user here; give an absolute path" in errors[0]


@pytest.mark.parametrize("typed", ["~notes.txt", "./~notes.txt"])
def test_a_file_whose_name_begins_with_a_tilde(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("./~notes.txt").write_text("a few words\n" * 2000)
    run = compose([f"data.path={typed}", "data.vocab_size=300", "tracker=local"]).run
    assert run.data.path in (str(tmp_path / "~notes.txt"), (str(tmp_path / "~notes.txt"),))
    assert not list(validate_inputs(run, RunDir(tmp_path / "run"), hosts=[]))


def test_the_home_of_a_user_in_a_pod():
    with pytest.raises(ConfigErrors, match=r"data\.path=~ada/x.*a pod has other users; give the absolute path"):
        compose(["backend=kubernetes", "backend.image=x", "data.path=~ada/x"])
    compose(["backend=kubernetes", "backend.image=x", "data.path=~/x"])


@pytest.mark.parametrize("verb", [["plan", "--config-dir"], ["runs", "--root"]])
def test_a_folder_of_an_unknown_user_for_a_verb(verb):
    with pytest.raises(ConfigError, match=f"{verb[1]}=~no-such-user/x: there is no user no-such-user here"):
        parse(verb[0], [verb[1], "~no-such-user/x"])


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ConfigErrors, match=r"data\.path=~/x.*this user has no home folder; set HOME"):
        compose(["data.path=~/x"])
    assert home_folder() == Path("/")


@pytest.mark.parametrize("name", ["a b", "a=b", "it's", "a,b", "[a]", "ünï/日本", "~a", "a%20b", 'a"b', "{a}", "a$b"])
def test_a_folder_of_options_of_any_name(name, tmp_path):
    experiments = tmp_path / name / "exp"
    experiments.mkdir(parents=True)
    (experiments / "mine.yaml").write_text("# @package _global_\njob:\n  steps: 7\n")
    assert compose(["+exp=mine"], config_dir=tmp_path / name).run.job.steps == 7


@pytest.mark.parametrize(
    "words",
    [
        ["job=generate", "job.tokenizer=bytes", "parallel=single", "backend.ranks=1"],
        ["job=quantize", "quantization=int8_weight", "job.tokenizer=bytes", "parallel=single", "backend.ranks=1"],
    ],
    ids=["generate", "quantize"],
)
def test_an_output_in_a_folder_that_cannot_be_written(words, tmp_path, monkeypatch):
    """The answers of an hour would be computed first."""
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(path) != closed or not mode & os.W_OK)
    errors = refused([*words, f"job.output={closed}/x"])
    assert errors == [f"job.output={closed}/x: {closed} is not writable; set job.output to a path in a folder of yours"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["job=generate", "job.engine=echo"], ["metrics.jsonl", "run.yaml", "generated", "generated/x", ".lock", ""]),
        (["job=quantize", "quantization=int8_weight"], ["logs", "checkpoints/x", "quantize.json", "wandb", ""]),
    ],
    ids=["generate", "quantize"],
)
def test_an_output_that_is_the_runs_own(words, names, tmp_path):
    """Answers and metrics would end up in one file."""
    words = [*words, "job.tokenizer=bytes", "parallel=single", "backend.ranks=1", f"run.dir={tmp_path}/run"]
    (tmp_path / "run").mkdir()
    for name in names:
        (error,) = refused([*words, f"job.output={tmp_path}/run/{name}".rstrip("/")])
        assert f"belongs to the run itself, whose directory is {tmp_path}/run; name a f" in error


def test_an_output_that_would_be_a_folder_of_all_runs(tmp_path, monkeypatch):
    """It is no file yet, so nothing else says that the answers of an hour cannot go there."""
    monkeypatch.chdir(tmp_path)
    words = ["job=generate", "job.engine=echo", "job.tokenizer=bytes", "parallel=single", "backend.ranks=1"]
    (error,) = refused([*words, "job.output=runs"])
    assert error.startswith("job.output=runs: belongs to the run itself")


def test_an_output_in_the_run_directory_that_no_run_writes(tmp_path):
    words = ["job=generate", "job.engine=echo", "job.tokenizer=bytes", "parallel=single", "backend.ranks=1"]
    (tmp_path / "run").mkdir()
    for name in ("answers.jsonl", "generated.jsonl"):
        prepare(compose([*words, f"run.dir={tmp_path}/run", f"job.output={tmp_path}/run/{name}"]))


def test_names_of_a_run_directory_are_reserved(tmp_path):
    run_dir = RunDir(tmp_path)
    properties = [name for name, value in vars(RunDir).items() if isinstance(value, property)]
    paths = [value for name in properties if isinstance(value := getattr(run_dir, name), Path)]
    assert len(paths) > 10
    assert [path for path in paths if not run_dir.reserves(path)] == []
    assert not run_dir.reserves(tmp_path.with_name("beside"))


def test_an_output_that_names_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["job=generate", "job.tokenizer=bytes", "parallel=single", "backend.ranks=1"]
    errors = refused([*words, "job.output=answers/"])
    assert errors == ["job.output=answers/: names a folder; name a file: job.output=answers/answers.jsonl"]
