"""What the slurm backend refuses before anything is asked, and the script it makes: no Slurm needed."""

import os
import shlex
import signal
import sys
from types import SimpleNamespace

import pytest

from launcher.backends.slurm import entrypoint
from launcher.backends.slurm.client import SlurmPartition, error_text
from launcher.backends.slurm.sbatch import render_sbatch
from launcher.backends.slurm.submit import sbatch_error, submission_env, validate_partitions
from launcher.config.backend.slurm import SlurmBackend
from launcher.doctor.host_facts import _cores
from launcher.errors import ConfigErrors
from tests.conftest import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "golden"
MAIN = SlurmPartition(name="main", is_default=True, limit="infinite", num_nodes=4)
SHORT = SlurmPartition(name="short", is_default=False, limit="5:00", num_nodes=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"nodes": 0}, "backend.nodes=0"),
        ({"time": "90"}, "backend.time=90: is not a time"),
        ({"time": "01:99:00"}, "backend.time=01:99:00"),
        ({"time": "100:00:00"}, "backend.time=100:00:00"),
        ({"time": "00:02:00"}, "120 s before the limit"),
        ({"signal_lead_s": 60}, "backend.signal_lead_s=60: ranks have backend.preempt_grace_s=60"),
        ({"mem": "lots"}, "backend.mem=lots"),
        ({"partition": "a\nb"}, "line break"),
        ({"account": ""}, "backend.account=: is empty"),
        ({"sbatch_options": ("-p main",)}, "backend.sbatch_options='-p main'"),
        ({"sbatch_options": ("--partition=x",)}, "set backend.partition instead"),
        ({"sbatch_options": ("--part=x",)}, "set backend.partition instead"),
        ({"sbatch_options": ("--array=1-9",)}, "--array is set by a sweep (-m) and backend.max_parallel"),
        ({"sbatch_options": ("--exclusive",)}, "set backend.exclusive instead"),
        ({"sbatch_options": ("--mem-per-cpu=4G",)}, "set backend.mem instead"),
        ({"sbatch_options": ("--container-image=x",)}, "set backend.container instead"),
        ({"max_parallel": 0}, "backend.max_parallel=0: must be at least 1"),
        ({"setup": ("",)}, "backend.setup='': is empty"),
        ({"setup": ("true", "a\nb")}, "backend.setup='a\\nb': is empty, or holds a line break"),
        ({"setup": ("module load \\",)}, "ends in a backslash"),
        ({"setup": ("echo 'a",)}, "has a quote that is not closed"),
        ({"image": "x.sif"}, "backend.image=x.sif: ranks run in no container"),
        ({"python": "python3"}, "backend.python=python3: ranks run in no container"),
        ({"container_mounts": ("/a",)}, "backend.container_mounts=/a: ranks run in no container"),
        ({"container": "pyxis"}, "backend.container=pyxis: needs an image"),
        ({"container": "apptainer", "image": "--writable"}, "backend.image='--writable': is empty, begins with a dash"),
        ({"container": "apptainer", "image": "x", "python": " "}, "backend.python=' ': is empty"),
        ({"container": "pyxis", "image": "x", "container_mounts": ("data",)}, "backend.container_mounts='data'"),
        (
            {"container": "pyxis", "image": "x", "container_mounts": ("/a:/b:rx",)},
            "backend.container_mounts='/a:/b:rx'",
        ),
        ({"sbatch_options": ("--comment=a\n#SBATCH --uid=0",)}, "is not one word"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, named):
    with pytest.raises(ConfigErrors) as refused:
        SlurmBackend(**options)
    assert named in str(refused.value)


def test_times():
    assert SlurmBackend(time="01:30:00").time_s() == 5400
    assert SlurmBackend(time="2-00:00:00").time_s() == 172800
    assert SlurmBackend().time_s() is None


@pytest.mark.parametrize(
    ("limit", "seconds"), [("5:00", 300), ("1:00:00", 3600), ("2-00:00:01", 172801), ("infinite", float("inf"))]
)
def test_limits_of_partitions(limit, seconds):
    assert SlurmPartition(name="p", is_default=False, limit=limit, num_nodes=1).limit_s == seconds


def test_the_nodes_are_stand_ins_with_a_rank_a_gpu():
    hosts = SlurmBackend(nodes=2, gpus_per_node=4).hosts(max_ranks=None)
    assert [(host.name, host.slots, len(host.devices), host.is_probed) for host in hosts] == [
        ("node0", 4, 4, False),
        ("node1", 4, 4, False),
    ]
    assert [host.slots for host in SlurmBackend().hosts(max_ranks=1)] == [1]
    assert [host.slots for host in SlurmBackend(ranks=3, gpus_per_node=4).hosts(max_ranks=None)] == [3]


def test_what_no_partition_can_give_is_refused_with_what_there_is(monkeypatch):
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    asked = SlurmBackend(partition="short", time="01:00:00", nodes=3)
    errors = "\n".join(map(str, validate_partitions(asked, [MAIN, SHORT])))
    assert "backend.time=01:00:00: partition short allows 5:00" in errors
    assert "backend.nodes=3: partition short has 2" in errors
    assert "main (up to infinite, 4 nodes), short (up to 5:00, 2 nodes)" in errors
    assert [error.option for error in validate_partitions(SlurmBackend(partition="nope"), [MAIN])] == [
        "backend.partition"
    ]
    assert [error.option for error in validate_partitions(SlurmBackend(), [SHORT])] == ["backend.partition"]
    assert not list(validate_partitions(SlurmBackend(nodes=4, time="9-00:00:00"), [MAIN, SHORT]))
    assert not list(validate_partitions(SlurmBackend(partition="short,main", nodes=4), [MAIN, SHORT]))


def test_no_variable_of_the_shell_changes_what_the_script_says():
    words = "SBATCH_EXPORT SBATCH_ARRAY_INX SBATCH_PARTITION SBATCH_ACCOUNT SLURM_JOB_ID SLURM_CONF HOME"
    kept = submission_env(SlurmBackend(partition="mine"), dict.fromkeys(words.split(), "x"))
    assert list(kept) == ["SBATCH_ACCOUNT", "SLURM_CONF", "HOME"]


def test_slurms_words_become_one_line():
    assert error_text("sbatch: error: one.\nsbatch: error: two\n\n") == "one; two"


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("Batch job submission failed: Invalid qos specification", "backend.qos=gold"),
        (
            "Batch job submission failed: Invalid account or account/partition combination specified",
            "backend.account=me",
        ),
        ("Batch job submission failed: Something new", "backend=slurm"),
    ],
)
def test_slurms_words_name_an_option(words, option):
    assert f"{option}: Slurm reports: {words}" in str(sbatch_error(SlurmBackend(qos="gold", account="me"), words))


def test_the_script(plan_of):
    backend = SlurmBackend(
        nodes=2,
        partition="main",
        time="1-00:00:00",
        gpus_per_node=8,
        cpus_per_task=64,
        mem="512G",
        constraint="a100&ib",
        exclude="n[7-9]",
        requeue=False,
        exclusive=True,
        setup=("module load cuda/12.4  # the driver's", "source '/opt/my env.sh'"),
        sbatch_options=("--mail-type=FAIL", '--comment=it\'s a "test" \\ # $HOME'),
    )
    plan = plan_of("tracker=local", "run.name=my run", "backend.ranks=8", hosts=backend.hosts(max_ranks=None))
    text = render_sbatch(backend, plan).replace(shlex.quote(sys.executable), "/venv/bin/python")
    file = GOLDEN / "job.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_a_line_of_setup_may_hold_tabs_comments_and_escaped_quotes():
    assert SlurmBackend(setup=("a\tb", "echo it\\'s # don't", "echo a\\\\")).setup


def script_of(plan_of, backend, *words):
    plan = plan_of("backend=slurm", "tracker=local", *words, hosts=backend.hosts(max_ranks=None))
    return plan, render_sbatch(backend, plan)


def test_memory_follows_from_the_plan(plan_of):
    on_cpu = ("model=gpt2_xl", "backend.mem=plan", "backend.ranks=2")
    plan, text = script_of(plan_of, SlurmBackend(mem="plan", ranks=2), *on_cpu)
    assert plan.memory is not None
    state = 2 * (plan.memory.per_rank.device + plan.memory.checkpoint_copies)  # a node without GPUs holds all of it
    gib = -(-(state + (5 << 30)) * 5 // 4 // (1 << 30))
    assert f"#SBATCH --mem={gib}G\n" in text
    assert plan.hosts[0].host.memory_bytes == gib << 30
    assert "2.00 GiB for each of 2 ranks, and 1.00 GiB for the launcher, and a quarter more for activations\n" in text
    on_gpu = (*on_cpu, "backend.gpus_per_node=2")
    plan, text = script_of(plan_of, SlurmBackend(mem="plan", ranks=2, gpus_per_node=2), *on_gpu)
    assert plan.memory is not None
    assert f"#SBATCH --mem={5 + -(-2 * plan.memory.checkpoint_copies // (1 << 30))}G\n" in text
    assert "quarter" not in text


def test_too_little_memory_for_the_plan_is_refused(plan_of):
    with pytest.raises(ConfigErrors, match=r"backend\.mem=2G: is 2\.00 GiB, and a node needs at least 24\.\d+ GiB"):
        script_of(plan_of, SlurmBackend(), "model=gpt2_xl", "backend.mem=2G")
    for enough in ("backend.mem=200G", "backend.mem=0", "backend.mem=null"):
        assert "--mem=plan" not in script_of(plan_of, SlurmBackend(), "model=gpt2_xl", enough)[1]
    with pytest.raises(ConfigErrors, match=r"backend\.mem=plan: there is no estimate"):
        script_of(plan_of, SlurmBackend(), "model=hf", "model.name=a/b", "backend.mem=plan")


def test_cores_are_those_that_slurm_allocates():
    here = len(os.sched_getaffinity(0))
    assert _cores({}) == _cores({"SLURM_CPUS_ON_NODE": "4096"}) == _cores({"SLURM_CPUS_ON_NODE": "x"}) == here
    assert _cores({"SLURM_CPUS_ON_NODE": "1"}) == 1


def test_a_job_preempted_while_run_yaml_loads_is_queued_again(tmp_path, monkeypatch):
    queued = []

    def load(_path, *, is_own_run):
        signal.raise_signal(signal.SIGUSR1)
        return SimpleNamespace(backend=SimpleNamespace(requeue=True))

    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(sys, "argv", ["entrypoint", str(tmp_path)])
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(entrypoint, "load_run", load)
    monkeypatch.setattr(entrypoint, "requeue", lambda: queued.append(True))
    try:
        with pytest.raises(SystemExit) as ended:
            entrypoint.main()
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    assert (ended.value.code, queued) == (75, [True])
