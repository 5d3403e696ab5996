"""Whole runs on several hosts over real ssh: what arrives there, what is lost with a host, and how a run continues."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_json
from tests.helpers import losses, wait_until_empty
from tests.torchless import ECHO, endless, wait_for_answers

from .contract import SMALL as SMALL_FOR_ALL
from .contract import ForkedBackendContract

SMALL = (
    *("backend.threads=1", "tracker=local", "data=synthetic", "job.log_every=1", "job.eval_every=0"),
    *(
        "model.num_hidden_layers=1",
        "model.hidden_size=32",
        "model.max_position_embeddings=32",
        "job.sequence_length=16",
        "job.micro_batch=2",
    ),
    *("job.eval_sequences=6", "job.sample_tokens=0", "schedule.warmup_steps=2"),
)


@pytest.fixture(scope="module")
def plain_lab(lab_hosts_of_module):
    return lab_hosts_of_module(3)


@pytest.fixture
def lab(plain_lab, fork_on):
    """Those hosts, where interpreters are forked: the first test of the contract starts them without forks."""
    fork_on(plain_lab)
    return plain_lab


def on(lab):
    return ("backend=ssh", f"backend.hostfile={lab.hostfile}", f"backend.ssh_config={lab.ssh_config}")


def over_ssh(lab, *words):
    return (*on(lab), *SMALL, *words)


def ranks_of(run_dir):
    """Return number and environment of every rank process of a run, on whichever host."""
    needle = f"launcher.jobs.rank\0{run_dir}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and needle in (entry / "cmdline").read_bytes():
                words = (entry / "environ").read_bytes().decode().split("\0")
                environ = dict(word.partition("=")[::2] for word in words if word)
                if "RANK" in environ:
                    found[int(entry.name)] = environ
        except OSError:
            continue
    return found


def left_on(lab):
    return {name: lab.processes(name) for name in lab.names if lab.processes(name)}


def wait_until_nothing_is_left(lab, seconds=10):
    wait_until_empty(lambda: left_on(lab), seconds=seconds)


class TestContract(ForkedBackendContract):
    @pytest.fixture
    def words(self, tmp_path):
        (tmp_path / "hosts").write_text("node1 slots=1\nada@node2:2222 slots=1\n")
        return ("backend=ssh", f"backend.hostfile={tmp_path}/hosts")

    @pytest.fixture
    def run(self, plain_lab, launch):
        return self.starting(launch, plain_lab)

    @pytest.fixture
    def failing_run(self, lab, launch_forked):
        return self.starting(launch_forked, lab)

    def starting(self, launch, lab):
        chosen = (f"backend.hostfile={lab.hostfile}", f"backend.ssh_config={lab.ssh_config}", "backend.exclude=node3")

        def start(*more):
            ended = launch(*SMALL_FOR_ALL, "backend=ssh", *chosen, *more)
            return ended.returncode, ended.output, RunDir(ended.run_dir)

        return start

    @pytest.fixture
    def left(self, plain_lab):
        return lambda: left_on(plain_lab)


def test_three_hosts_take_the_steps_of_one(lab, launch_forked, tmp_path):
    launch_forked(*over_ssh(lab, "job.steps=6", "run.dir=many")).expect(0)
    launch_forked(*SMALL, "backend.ranks=3", "job.steps=6", "run.dir=one").expect(0)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


def test_no_rank_of_three_hosts_starts_before_all_are_prepared(lab, launch_forked, tmp_path):
    ended = launch_forked(*on(lab), *ECHO, "run.dir=many").expect(0)
    assert "rank 0 on " in ended.stdout or "ranks 0-2 on " in ended.stdout
    session = read_json(tmp_path / "many" / "session.json")
    assert [agent["host"] for agent in session["agents"]] == list(lab.names)
    events = [json.loads(line)["what"] for line in (tmp_path / "many" / "timeline.jsonl").read_text().splitlines()]
    assert events.count("prepared") == 3
    assert max(place for place, what in enumerate(events) if what == "prepared") < events.index(
        "the launcher of the ranks runs"
    )
    assert events[-1] == "all processes of the run have exited" or "completed, exit code 0" in events
    wait_until_nothing_is_left(lab)


def test_500_strings_arrive_and_secrets_stand_nowhere(
    lab, launch_forked_in_background, tmp_path, monkeypatch, nasty_strings
):
    forwarded = {f"HF_NASTY_{number}": value for number, value in enumerate(nasty_strings)}
    for name, value in forwarded.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_API_KEY", "hunter2" * 6)
    monkeypatch.setenv("PET_NNODES", "7")
    stop = "job.stop=['{}']".format('it\\\'s $HOME `id` "x" {a,b} ü')
    running = launch_forked_in_background(*on(lab), *endless(tmp_path), "run.dir=nasty", stop)
    wait_for_answers(tmp_path / "nasty", ranks=3)
    found = ranks_of(tmp_path / "nasty")
    assert {environ["RANK"] for environ in found.values()} == {"0", "1", "2"}
    for environ in found.values():
        assert {name: environ.get(name) for name in forwarded} == forwarded
        assert environ["WANDB_API_KEY"] == "hunter2" * 6
        assert "PET_NNODES" not in environ
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "cmdline").exists():
            assert b"hunter2" not in (entry / "cmdline").read_bytes()
    running.send_signal(signal.SIGINT)
    assert running.wait() == 130
    for file in (tmp_path / "nasty").rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file
    assert "hunter2" not in running.output
    from launcher.config.snapshot import load_run

    assert load_run(tmp_path / "nasty" / "run.yaml").job.stop == ('it\'s $HOME `id` "x" {a,b} ü',)
    wait_until_nothing_is_left(lab)


def test_a_stopped_launcher_is_no_dead_one(lab, launch_forked_in_background, tmp_path):
    words = (*on(lab), *endless(tmp_path), "backend.heartbeat_timeout_s=2", "run.dir=held")
    running = launch_forked_in_background(*words)
    wait_for_answers(tmp_path / "held", ranks=3)
    running.send_signal(signal.SIGTSTP)
    time.sleep(6)
    before = len(ranks_of(tmp_path / "held"))
    running.send_signal(signal.SIGCONT)
    time.sleep(4)
    assert before == len(ranks_of(tmp_path / "held")) == 6  # each with its rank monitor
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=120) == 75
    wait_until_nothing_is_left(lab)


def test_nothing_starts_where_one_host_is_missing(lab, launch_forked, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text(lab.hostfile.read_text() + "root@127.0.0.1:9 slots=1\n")
    ended = launch_forked(*over_ssh(lab, f"backend.hostfile={hostfile}", "run.dir=none")).expect(69)
    assert "127.0.0.1" in ended.stderr
    assert "nothing listens on its ssh port" in ended.stderr
    assert "error: error" not in ended.stderr
    assert not (tmp_path / "none").exists()
    assert left_on(lab) == {}


def test_a_run_goes_on_without_a_host_that_died(
    lab_hosts, fork_on, launch_forked, launch_forked_in_background, tmp_path
):
    lab = lab_hosts(3)
    fork_on(lab)
    words = ("job.steps=24", "job.global_batch=12", "checkpoint.every=8", "checkpoint.keep=0", "job.micro_batch=1")
    restarting = ("backend.restarts=1", "backend.min_hosts=2")
    running = launch_forked_in_background(*over_ssh(lab, *words, *restarting, "run.dir=cut"))
    running.wait_for_output("checkpoint ")
    running.wait_for_output("step ")
    lab.power_off(lab.names[1])
    assert running.wait(timeout=200) == 0, running.output
    assert f"restarting on {lab.names[0]}, {lab.names[2]}" in running.output
    resumed_at = int(running.output.split("continuing after step ")[1].split()[0])
    failure = read_json(tmp_path / "cut" / "failure.before_restart_1.json")
    assert failure["host"] == lab.names[1]
    assert failure["rank"] is None
    assert read_json(tmp_path / "cut" / "result.json")["status"] == "completed"
    assert sorted(losses(tmp_path / "cut")) == list(range(1, 25))
    start_from = f"checkpoint.resume=cut/checkpoints/step_{resumed_at:08}"
    launch_forked(*SMALL, *words, "backend.ranks=2", "run.dir=undisturbed", start_from).expect(0)
    assert losses(tmp_path / "cut", after=resumed_at) == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-6)
    wait_until_nothing_is_left(lab)


@pytest.mark.parametrize("fault", ["cut", "sshd"])
def test_a_host_that_is_cut_off_ends_its_part_and_is_named(
    lab_hosts, fork_on, launch_forked_in_background, tmp_path, fault
):
    lab = lab_hosts(2)
    fork_on(lab)
    running = launch_forked_in_background(*on(lab), *endless(tmp_path), "run.dir=cut")
    wait_for_answers(tmp_path / "cut")
    broken = time.monotonic()
    if fault == "cut":
        lab.fault(lab.names[1], "cut")
    else:
        lab.kill_sshd(lab.names[1])
    assert running.wait() == 1
    wait_until_nothing_is_left(lab, seconds=max(0.1, broken + 10 - time.monotonic()))
    failure = read_json(tmp_path / "cut" / "failure.json")
    assert failure["host"] == lab.names[1]
    assert failure["rank"] is None


def test_the_wrong_key_is_named_with_its_remedy(lab, launch_forked, tmp_path):
    key = tmp_path / "id_other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    config = tmp_path / "config"
    text = lab.ssh_config.read_text()
    config.write_text(
        "\n".join(line for line in text.splitlines() if "IdentityFile" not in line) + f"\n  IdentityFile {key}\n"
    )
    ended = launch_forked(*over_ssh(lab, f"backend.ssh_config={config}", "run.dir=none")).expect(69)
    assert all(name in ended.stderr for name in lab.names)
    assert "ssh-copy-id" in ended.stderr
    assert not (tmp_path / "none").exists()
