"""What a launcher may change in a run directory: what it made itself, and what a run has put there."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest

from launcher.backends.slurm import submit
from launcher.backends.slurm.client import SlurmPartition
from launcher.config.build import build_run
from launcher.config.compose import compose
from launcher.config.job.generate import stored_fingerprint
from launcher.config.run import Run, run_to_tree
from launcher.config.snapshot import save_run
from launcher.errors import ConfigError, EnvironmentProblem, JobError
from launcher.execution import lifecycle
from launcher.execution.validate import validate_run_dir
from launcher.inference.batch.output import PartIndex, PartWriter, claim_output, merge_parts
from launcher.protocol.messages import Assignment
from launcher.protocol.metrics import MetricsWriter
from launcher.protocol.plan import Command, Host, HostPlan
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import locate_this_process
from launcher.runs.lock import RunLock
from launcher.supervision.finalize import result_files
from launcher.supervision.host_agent import stage_run_dir
from launcher.supervision.rank_monitor import redirect_output
from launcher.supervision.timeline import Timeline
from launcher.utils.files import UnreadableFile, atomic_file, write_atomic, write_json
from launcher.utils.logs import open_log
from tests.conftest import Launch

SMALL = ("model.num_hidden_layers=1", "model.hidden_size=32", "tracker=local", "data=synthetic")
SLURM = (*SMALL, "backend=slurm")
BACKENDS = {
    "local": SMALL,
    "slurm": SLURM,
    "ssh": (*SMALL, "backend=ssh", "backend.hostfile=hosts"),
    "deepspeed": (*SMALL, "backend=deepspeed", "backend.hostfile=hosts"),
    "kubernetes": (*SMALL, "backend=kubernetes", "backend.image=registry.example/x:1"),
}
USERS = {
    "files": {"thesis.tex": "text", "data/raw.csv": "1,2", ".hidden": "x"},
    "one_hidden_file": {".bashrc": "x"},
    "logs_of_another_program": {"logs/app.log": "started"},
    "a_run_yaml_of_another_program": {"run.yaml": "steps:\n  - make\n", "plan.json": "[]"},
    "a_plan_that_is_no_json": {"plan.json": "{", "metrics.jsonl": "mine"},
    "checkpoints": {"checkpoints/step_00000010/model.safetensors": "weights"},
}


def tree_of(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder, and the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def write_json_at(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True)
    write_json(file, value)


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], str]], None]:
    """Make this machine one with Slurm, whose sbatch is a function that gets the script."""

    def install(sbatch: Callable[[Path], str]) -> None:
        queues = [SlurmPartition(name="main", is_default=True, limit="infinite", num_nodes=4)]
        monkeypatch.setattr(submit, "partitions", lambda: queues)
        monkeypatch.setattr(submit, "_check_not_queued", lambda _run_dir: None)
        monkeypatch.setattr(submit, "_sbatch", lambda _backend, file: sbatch(file))

    return install


def refuse(_file: Path) -> str:
    raise ConfigError("backend.account", "nope", why="Slurm reports: Invalid account", fix="`sinfo` shows what it has")


def written_run(folder: Path, launch_in_process: Launch, slurm: Callable[[Callable[[Path], str]], None]) -> RunDir:
    """Return the directory of a run that was queued, and has ended."""
    slurm(lambda _file: "41")
    launch_in_process(*SLURM, f"run.dir={folder}").expect(0)
    run_dir = RunDir(folder)
    write_json(run_dir.result, {"status": "preempted", "exit_code": 75, "metrics": {}})
    return run_dir


@pytest.mark.parametrize("backend", BACKENDS)
def test_auto_refuses_a_folder_that_no_run_has_filled(launch_in_process: Launch, tmp_path: Path, backend: str) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    mine = tmp_path / "mine"
    fill(mine, USERS["files"])
    before = tree_of(tmp_path)
    refused = launch_in_process(*BACKENDS[backend], "checkpoint.resume=auto", f"run.dir={mine}").expect(2)
    assert (
        f"run.dir={mine}: is not empty, and is not the directory of a run: it holds .hidden, data, thesis"
        in refused.stderr
    )
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("users", USERS)
def test_auto_knows_a_run_by_what_run_yaml_holds(launch_in_process: Launch, tmp_path: Path, users: str) -> None:
    mine = tmp_path / "mine"
    fill(mine, USERS[users])
    before = tree_of(tmp_path)
    refused = launch_in_process(*SMALL, "checkpoint.resume=auto", "run.dir=mine").expect(2)
    assert "run.dir=" in refused.stderr
    assert "is not empty, and is not the directory of a run" in refused.stderr
    assert tree_of(tmp_path) == before


JOBS: dict[str, tuple[str, ...]] = {
    "train": (),
    "evaluate": (),
    "generate": (),
    "serve": (),
    "verify": ("parallel=ddp",),
    "quantize": ("quantization=int8_weight", "parallel=single"),
    "sparsify": ("sparsity=magnitude", "parallel=single"),
    "benchmark": ("benchmark=batching",),
}
"""Every kind of job, and what its command needs."""


@functools.cache
def run_of(job: str, *words: str) -> Run:
    small = (word for word in SMALL if job != "benchmark" or not word.startswith("data"))
    return compose((f"job={job}", *(words or JOBS[job]), *small)).run


@pytest.mark.parametrize("held", JOBS)
def test_no_run_takes_the_folder_of_another_job(tmp_path: Path, held: str) -> None:
    save_run(run_of(held), tmp_path / "run.yaml")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = tree_of(tmp_path)
    for job, resume in itertools.product(JOBS, ("none", "auto")):
        run = run_of(job)
        run = replace(run, checkpoint=replace(run.checkpoint, resume=resume))
        said = [str(error) for error in validate_run_dir(run, RunDir(tmp_path))]
        if job != held:
            assert len(said) == 1, (job, resume)
            assert f"contains a run of job={held}" in said[0]
            assert "checkpoint.resume" not in said[0], "advice that would be refused"
        elif resume == "auto":
            assert said == []
        else:
            assert "set checkpoint.resume=auto to continue it" in said[0]
    assert tree_of(tmp_path) == before


def test_no_benchmark_takes_the_folder_of_another_one(tmp_path: Path) -> None:
    save_run(run_of("benchmark", "benchmark=activation", "checkpoint.resume=auto"), tmp_path / "run.yaml")
    run = run_of("benchmark", "benchmark=batching", "checkpoint.resume=auto")
    (error,) = validate_run_dir(run, RunDir(tmp_path))
    assert "contains a run of job=benchmark benchmark=activation" in str(error)


def test_a_command_that_names_the_folder_of_another_job_leaves_it(launch_in_process: Launch, tmp_path: Path) -> None:
    fill(tmp_path, {"run/metrics.jsonl": "{}", "run/result.json": "{}", "run/plan.json": '{"run_id": "x"}'})
    save_run(run_of("train"), tmp_path / "run" / "run.yaml")
    before = tree_of(tmp_path)
    words = (*SMALL[:2], "job=generate", "checkpoint.resume=auto", "run.dir=run")
    assert "contains a run of job=train" in launch_in_process(*words).expect(2).stderr
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_what_slurm_refuses_leaves_nothing_of_a_new_directory(
    launch_in_process: Launch, tmp_path: Path, slurm: Callable[..., None], resume: str
) -> None:
    slurm(refuse)
    refused = launch_in_process(*SLURM, f"checkpoint.resume={resume}", "run.dir=new/one").expect(2)
    assert "backend.account=nope" in refused.stderr
    assert tree_of(tmp_path) == {}


def test_what_slurm_refuses_leaves_an_empty_folder_and_a_link_to_it(
    launch_in_process: Launch, tmp_path: Path, slurm: Callable[..., None]
) -> None:
    slurm(refuse)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    launch_in_process(*SLURM, "checkpoint.resume=auto", "run.dir=link").expect(2)
    assert tree_of(tmp_path) == {"empty": None, "link": None}, "not even a line in the index of runs"


def test_what_slurm_refuses_leaves_a_run_as_it_was(
    launch_in_process: Launch, tmp_path: Path, slurm: Callable[..., None]
) -> None:
    run_dir = written_run(tmp_path / "run", launch_in_process, slurm)
    before, age = tree_of(tmp_path), run_dir.snapshot.stat().st_mtime_ns
    slurm(refuse)
    launch_in_process("resume", "run", "backend.account=nope", "job.steps=999").expect(2)
    assert tree_of(tmp_path) == before
    assert run_dir.snapshot.stat().st_mtime_ns == age


def test_what_was_queued_stays_when_slurm_then_falls_silent(
    launch_in_process: Launch, tmp_path: Path, slurm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_plan: object, _job_id: str) -> int:
        raise EnvironmentProblem("Slurm no longer answers")

    slurm(lambda _file: "7")
    monkeypatch.setattr("launcher.backends.slurm.submit.follow", silent)
    launch_in_process(*SLURM, "backend.wait=true", "run.dir=run").expect(2)
    assert RunDir(tmp_path / "run").is_run
    assert (tmp_path / "run" / "job.sbatch").is_file()


def test_a_second_launcher_is_refused_while_the_first_submits(
    launch_in_process: Launch, tmp_path: Path, slurm: Callable[..., None]
) -> None:
    errors = []

    def submit_twice(_file: Path) -> str:
        before = tree_of(tmp_path)
        errors.append(
            launch_in_process(*SLURM, "checkpoint.resume=auto", "job.steps=5", "run.dir=run").expect(2).stderr
        )
        assert tree_of(tmp_path) == before
        return "7"

    slurm(submit_twice)
    launch_in_process(*SLURM, "run.dir=run").expect(0)
    assert "another run (process" in errors[0]
    assert json.loads((tmp_path / "run" / "session.json").read_text())["job"] == {"id": "7"}


def test_a_run_that_ends_while_this_one_waits_for_the_lock_is_kept(
    launch_in_process: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(RunLock):
        def acquire(self) -> RunLock:
            fill(tmp_path / "run", {"run.yaml": "job:\nmodel:\nbackend:\nrun:\n", "result.json": "{}"})
            before.update(tree_of(tmp_path))
            return super().acquire()

    before: dict[str, bytes | None] = {}
    monkeypatch.setattr(lifecycle, "RunLock", Late)
    refused = launch_in_process(*SMALL, "run.dir=run").expect(2)
    assert "two runs cannot share a directory" in refused.stderr
    del before["run/logs"]  # made by the launcher that was late, and empty
    assert tree_of(tmp_path) == before


def test_a_host_without_the_shared_disk_leaves_files_of_others(tmp_path: Path) -> None:
    fill(tmp_path / "mine", USERS["a_run_yaml_of_another_program"])
    before = tree_of(tmp_path)
    sent = Assignment(
        host=HostPlan(host=Host(name="node2", slots=1), first_rank=0, agent_command=Command(argv=("true",))),
        run_dir=str(tmp_path / "mine"),
        run_id="x",
        run_hash="x",
        grace_s=1.0,
        heartbeat_timeout_s=0.0,
        env={},
        files={"plan.json": "{}"},
        session=locate_this_process(),
    )
    with pytest.raises(EnvironmentProblem, match=r"mine holds files that no run has put there .* on node2; choose"):
        stage_run_dir(sent)
    assert tree_of(tmp_path) == before


def test_a_launcher_killed_before_it_wrote_anything_is_no_obstacle(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.logs.mkdir()
    (tmp_path / ".lock").write_text("123")
    assert run_dir.unexpected_files() == []
    (run_dir.logs / "mine.log").touch()
    assert run_dir.unexpected_files() == [".lock", "logs"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / ("n" * 250)
    write_atomic(file, "old")

    def broken(target: Path) -> None:
        with atomic_file(target) as opened:
            opened.write(b"new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        broken(file)
    assert tree_of(tmp_path) == {file.name: b"old"}


def test_answers_never_replace_a_file_that_another_process_made_meanwhile(tmp_path: Path) -> None:
    parts, output = tmp_path / "run" / "generated", tmp_path / "answers.jsonl"
    parts.mkdir(parents=True)
    claim_output(parts, output)
    output.write_text("ours, and the launcher was killed after that")
    claim_output(parts, output)
    other = tmp_path / "others.jsonl"
    other.write_text("mine")
    with pytest.raises(JobError, match=r"job.output=.*others.jsonl: another process made this file"):
        claim_output(parts, other)


def test_answers_that_cannot_be_written_are_kept_and_the_option_named(tmp_path: Path) -> None:
    parts = tmp_path / "run" / "generated"
    parts.mkdir(parents=True)
    (tmp_path / "gone").write_text("a file where the folder was")
    for output in (tmp_path / "gone" / "answers.jsonl", tmp_path / "never" / "answers.jsonl"):
        with pytest.raises(
            JobError, match=r"job.output=.*: cannot be written .*All answers are kept in .*launch resume"
        ):
            merge_parts(PartIndex(parts, 0), output, heartbeat=lambda: None)


@pytest.mark.parametrize("kind", ["link", "fifo"])
@pytest.mark.parametrize("writer", ["metrics", "discarded", "timeline", "log", "output of a rank", "answers"])
def test_nothing_is_written_through_a_link_in_a_run_directory(writer: str, kind: str, tmp_path: Path) -> None:
    """The directory may be another user's, and the link may lead to any file of ours."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("mine\n")
    trap = run / {"discarded": "metrics.discarded.jsonl"}.get(writer, "file.jsonl")
    if kind == "link":
        trap.symlink_to(victim)
    else:
        os.mkfifo(trap)

    def write() -> None:
        if writer == "metrics":
            MetricsWriter(trap).close()
        elif writer == "discarded":
            (run / "metrics.jsonl").write_text('{"train/step": 9}\n')
            MetricsWriter(run / "metrics.jsonl").close()
        elif writer == "log":
            open_log(trap).close()
        elif writer == "output of a rank":
            redirect_output(trap)
        elif writer == "answers":
            PartWriter(trap)

    if writer == "timeline":
        Timeline(trap).note("node0", "prepared")  # a run continues without it
    else:
        with pytest.raises(UnreadableFile):
            write()
    assert victim.read_text() == "mine\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/vm.0.log", "generated/rank0.part"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_a_run_directory_with_links_is_refused_before_a_start(name: str, kind: str, tmp_path: Path) -> None:
    run = compose([*SMALL, f"run.dir={tmp_path}/run", "checkpoint.resume=auto"]).run
    run_dir = RunDir(tmp_path / "run")
    (run_dir.path / name).parent.mkdir(parents=True, exist_ok=True)
    save_run(run, run_dir.snapshot)
    (tmp_path / "elsewhere").mkdir()
    run_dir.checkpoints.symlink_to(tmp_path / "elsewhere")  # a folder on another disk is fine
    assert list(validate_run_dir(run, run_dir)) == []
    if kind == "fifo":
        os.mkfifo(run_dir.path / name)
    else:
        (run_dir.path / name).symlink_to("/etc/hostname" if kind == "link" else "nowhere")
    (error,) = validate_run_dir(run, run_dir)
    assert f"holds {name}, which is a link or not a regular file" in str(error)


def test_parts_that_no_run_writes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "rank0.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JobError, match=r"rank0\.part is a link or not a regular file: .*Remove it"):
        PartIndex(tmp_path, 3).scan()
    (tmp_path / "rank0.part").unlink()
    answer = b'{"line": 1}'
    (tmp_path / "rank0.part").write_bytes(
        b"".join(b"%d 4 a %08x %s\n" % (n, crc32(answer), answer) for n in (-1, 3, 1))
    )
    index = PartIndex(tmp_path, 3)
    index.scan()
    assert [number in index for number in range(3)] == [False, True, False]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"digest": ["x"], "options": {}}', '{"digest": "x", "options": []}']
)
def test_answers_to_an_unknown_task_are_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.dir=.*task\.json is damaged, .*; choose a new directory"):
        stored_fingerprint(tmp_path)
    assert (tmp_path / "task.json").read_text() == text


def test_only_files_of_the_end_are_forgotten(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.logs.mkdir()
    (run_dir.logs / "failure.rank3.json").touch()
    expected = ["failure.json", "failure.rank3.json", "result.json", "stacks.txt"]
    assert sorted(path.name for path in result_files(run_dir)) == expected


@pytest.mark.parametrize("name", ["{tmp}/model", "./model", "~/model", "hub/org/model"])
def test_a_models_path_is_no_part_of_a_runs_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = compose(["model=hf", f"model.name='{name.format(tmp=tmp_path)}'"]).run
    assert run.run.name == "model"
    assert build_run(run_to_tree(run), pytest.fail) == run


def test_a_run_of_a_models_folder_leaves_that_alone_and_is_listed(
    launch_in_process: Launch, tmp_path: Path, slurm: Callable[..., None]
) -> None:
    model = tmp_path / "models" / "mine"
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 300}
    write_json_at(model / "config.json", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes})
    before = tree_of(model)
    slurm(lambda _file: "7")
    words = ("model=hf", f"model.name={model}", "model.weights=random", "tracker=local", "data=synthetic")
    launch_in_process("backend=slurm", *words, "job.sequence_length=32").expect(0)
    assert tree_of(model) == before
    assert len(list((tmp_path / "runs" / "mine").iterdir())) == 1
    launch_in_process("backend=slurm", *words, "job.sequence_length=32", "run.dir=own").expect(0)
    listed = launch_in_process("runs").expect(0).stdout
    assert listed.count("mine") == 2
    assert "own " in listed


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/data/model", "is a path, .*set run.name=model; run.root names"),
        ("a/b", "is a path, .*set run.name=b"),
        ("..", "is a path, .*set run.name=mine"),
        (".index.jsonl", "is the file that lists runs .*; set another name"),
        ("''", "is empty"),
        ("n" * 201, "more than 200 bytes"),
    ],
)
def test_a_runs_name_is_one_folder(launch_in_process: Launch, name: str, why: str) -> None:
    refused = launch_in_process("plan", *SMALL, f"run.name={name}").expect(2)
    assert re.search(f"run.name=.*{why}", refused.stderr)
