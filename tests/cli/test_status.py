"""``launch status``: who runs a run, how far it is, and what to type next."""

from __future__ import annotations

import json

import pytest

from launcher.errors import ConfigError
from launcher.protocol.session_file import AgentLocation
from launcher.utils.files import write_json
from tests.helpers import launch_verb

run = launch_verb("status")


def status_text(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(words) == 0
    return capsys.readouterr().out


def value(text: str, label: str) -> str:
    return next(line.split("  ", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{label} "))


def test_a_real_run_that_is_over(capsys, completed, monkeypatch) -> None:
    monkeypatch.chdir(completed)
    text = status_text(capsys)
    folder = next(completed.glob("runs/*/*")).relative_to(completed)
    assert value(text, "status") == "completed"
    assert value(text, "run by").endswith(", gone")
    assert value(text, "ranks") == "2 on 1 host"
    assert value(text, "progress").startswith("step 3/3, loss ")
    assert value(text, "progress").endswith(" tokens/s")
    assert "exit code 0" in value(text, "ended")
    assert value(text, "next") == f"launch logs {folder}"
    assert f"launch rerun {folder}" in text
    tree = json.loads(status_text(capsys, "--json", folder.name[:8]))
    assert tree["metrics"]["train/step"] == 3
    assert [said["rank"] for said in tree["ranks"]] == [0, 1]
    assert tree["ranks"][0]["line"].startswith("loss curve: ")
    assert tree["session"]["session"]["pid"] > 0


def test_a_run_that_goes_on(capsys, make_run, alive, far) -> None:
    agents = (
        AgentLocation(host="box", location=alive),
        AgentLocation(host="b", ssh_destination="me@b:22", location=far),
    )
    run_dir = make_run(session=alive, agents=agents, step=4)
    run_dir.log_of("box", 0).write_bytes(b"step 3\nstep 4 \xff\n\n")
    run_dir.log_of("box", 1).write_text("")
    text = status_text(capsys)
    assert value(text, "run by") == f"process {alive.pid} on {alive.machine}, alive"
    assert f"b (me@b:22): process {far.pid} on node7, unknown from this machine" in text
    assert value(text, "progress").startswith("step 4/10, loss 2.5000, ")
    assert value(text, "box:0").startswith("step 4 \N{REPLACEMENT CHARACTER}  (")
    assert value(text, "box:1").startswith("nothing printed")
    assert value(text, "next").endswith("-f")
    assert "launch cancel runs/tiny/" in text
    assert "ended" not in text


def test_a_failed_run_names_its_cause(capsys, make_run, gone) -> None:
    run_dir = make_run(status="failed", exit_code=7, session=gone)
    write_json(run_dir.failure, {"reason": "rank 1 on box failed\nmore", "log": "/logs/box.1.log"})
    text = status_text(capsys)
    assert value(text, "cause") == "rank 1 on box failed"
    assert value(text, "log") == "/logs/box.1.log"
    assert "exit code 7" in value(text, "ended")
    assert "launch resume" not in text


@pytest.mark.parametrize("status", ["preempted", None])
def test_what_can_be_continued_says_so(capsys, make_run, gone, status: str | None) -> None:
    make_run(status=status, session=gone)
    assert "launch resume runs/tiny/" in status_text(capsys)


@pytest.mark.parametrize(
    ("backend", "job", "command"),
    [
        ("slurm", {"id": "7"}, "squeue --jobs=7"),
        (
            "kubernetes",
            {"kind": "job", "name": "a-b", "namespace": "ml"},
            "kubectl --namespace=ml get -- job a-b",
        ),
    ],
)
def test_a_scheduler_is_asked_about_its_job(capsys, make_run, gone, backend, job, command) -> None:
    make_run(session=gone, backend=backend, job=job)
    text = status_text(capsys)
    assert value(text, "status") == "elsewhere"
    assert value(text, "job").startswith(f"{backend}: ")
    assert command in text


@pytest.mark.parametrize(
    ("backend", "job"),
    [
        ("slurm", {"id": "--me; rm -rf ~"}),
        ("slurm", {"name": "a"}),
        ("kubernetes", {"kind": "job", "name": "a b", "namespace": "ml"}),
        ("kubernetes", {"id": "7"}),
    ],
)
def test_a_job_that_no_scheduler_names_so_is_not_asked_about(capsys, make_run, gone, backend, job) -> None:
    make_run(session=gone, backend=backend, job=job)
    text = status_text(capsys)
    assert value(text, "job").endswith("is not a valid job name)")
    assert "squeue" not in text
    assert "kubectl" not in text


def test_many_hosts_and_ranks_stay_readable(capsys, make_run, alive, far) -> None:
    agents = tuple(AgentLocation(host=f"n{n}", location=far if n else alive) for n in range(50))
    run_dir = make_run(session=alive, agents=agents)
    for rank in range(100):
        run_dir.log_of("box", rank).write_text("hello\n")
    text = status_text(capsys)
    assert value(text, "agents") == "1 alive, 49 unknown from this machine"
    assert "and 84 more" in text
    assert len(text.splitlines()) < 40
    assert len(json.loads(status_text(capsys, "--json"))["ranks"]) == 100


def test_a_run_that_left_nothing_but_its_configuration(capsys, make_run) -> None:
    run_dir = make_run()
    run_dir.plan.unlink()
    text = status_text(capsys, str(run_dir.path))
    assert value(text, "run by") == "not recorded"
    assert value(text, "ranks") == "not known"
    assert value(text, "progress") == "no step yet"


def test_one_run_at_a_time() -> None:
    with pytest.raises(ConfigError, match=r"unexpected argument b; write launch status \[RUN\]"):
        run(["a", "b"])


def test_help(capsys) -> None:
    assert "launch status 20260101" in status_text(capsys, "-h")


def test_a_run_without_steps_shows_none(capsys, make_run) -> None:
    run_dir = make_run(step=0)
    run_dir.plan.write_text(run_dir.plan.read_text().replace('"num_steps": 10', '"num_steps": 0'))
    text = status_text(capsys)
    assert value(text, "progress").startswith("loss 2.5000")


def test_an_evaluation_shows_the_step_that_it_measures(capsys, make_run) -> None:
    run_dir = make_run(step=40)
    run_dir.plan.write_text(run_dir.plan.read_text().replace('"work"', '"job": "evaluate", "work"'))
    assert value(status_text(capsys), "progress").startswith("evaluation of step 40, loss 2.5000")
