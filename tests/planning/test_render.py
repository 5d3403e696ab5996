"""Plans as people and programs read them, compared whole with files: ``UPDATE_GOLDEN=1 pytest`` rewrites them."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from launcher.planning.render import render_plan, shell_lines
from launcher.planning.topology import group_hosts
from launcher.protocol.plan import Command, Host
from launcher.utils.schema import to_tree
from tests.conftest import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "golden"
BOX = Host(name="box", slots=2, cores=4, memory_bytes=16 * 2**30)
GPUS = Host(
    name="big",
    slots=8,
    devices=("NVIDIA H100",) * 8,
    device_ids=tuple("01234567"),
    device_bytes=80 * 2**30,
    cores=64,
    memory_bytes=1024 * 2**30,
)


def cluster(count):
    return [replace(GPUS, name=f"node{n:04d}", address=f"10.0.{n // 256}.{n % 256}") for n in range(count)]


PLANS = {
    "default_on_cpu": ((), {}),
    "zero3_gpt2xl_on_gpus": (("+exp=zero3_gpt2xl",), {"hosts": [GPUS]}),
    "zero_infinity_on_cpu": (
        ("+exp=zero_infinity_gpt2xl",),
        {"hosts": [replace(BOX, slots=1)], "missing_ops": ["cpu_adam", "pin_memory", "async_io"]},
    ),
    "part_of_the_gpus_by_deepspeed": (
        ("+exp=zero1_gpt2", "backend.agent=deepspeed", "tracker=local", "backend.env={NCCL_DEBUG: INFO}"),
        {"hosts": [replace(GPUS, slots=2)]},
    ),
}


def compare(name, text):
    file = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PLANS)
def test_text_and_json(plan_of, name):
    words, arguments = PLANS[name]
    plan = plan_of(*words, **arguments)
    compare(f"{name}.txt", render_plan(plan))
    compare(f"{name}.json", json.dumps(to_tree(plan), indent=2, ensure_ascii=False) + "\n")


def test_a_thousand_hosts_are_shown_once(plan_of):
    plan = plan_of("+exp=zero2_gpt2_large", "job.global_batch=32768", hosts=cluster(1024))
    compare("thousand_hosts.txt", render_plan(plan))


@pytest.mark.parametrize("agent", ["torchrun", "deepspeed"])
def test_the_text_does_not_grow_with_hosts_alike(plan_of, agent):
    words = ("+exp=zero2_gpt2_large", "job.global_batch=null", f"backend.agent={agent}")
    few, many = (render_plan(plan_of(*words, hosts=cluster(count))) for count in (4, 400))
    assert len(few.splitlines()) == len(many.splitlines())


@pytest.mark.parametrize("difference", [{"cores": 32}, {"memory_bytes": 2**40 - 1}, {"device_bytes": 1}])
def test_a_host_that_differs_is_shown_by_itself(plan_of, difference):
    hosts = cluster(6)
    hosts[3] = replace(hosts[3], **difference)
    groups = group_hosts(plan_of("tracker=local", hosts=hosts).hosts)
    assert [(group.first.host.name, group.number, group.size) for group in groups] == [
        ("node0000", 0, 3),
        ("node0003", 3, 1),
        ("node0004", 4, 2),
    ]
    assert groups[0].varying == ("LAUNCHER_HOST", "CROSS_RANK", "--node-rank")
    assert groups[1].varying == ()


def test_a_command_that_differs_in_more_than_name_and_number_is_shown_by_itself(plan_of):
    one, two, three = plan_of("tracker=local", hosts=cluster(3)).hosts
    changed = replace(
        two, agent_command=replace(two.agent_command, env={**two.agent_command.env, "OMP_NUM_THREADS": "3"})
    )
    assert [group.size for group in group_hosts([one, changed, three])] == [1, 1, 1]
    longer = replace(two, agent_command=replace(two.agent_command, argv=(*two.agent_command.argv, "x")))
    assert [group.size for group in group_hosts([one, longer, three])] == [1, 1, 1]


def test_every_warning_and_the_reason_of_the_tracker_are_in_the_text(plan_of):
    plan = plan_of("+exp=zero3_gpt2xl", "schedule.warmup_steps=500")
    assert len(plan.warnings) >= 2
    assert all(warning in render_plan(plan) for warning in (*plan.warnings, plan.tracker.reason))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("job.epochs=2",), "a step; ranks count the text once it is tokenised"),
        (("model=hf", "model.name=org/model"), "not known before the model's files are downloaded"),
        (("checkpoint.every=10", "checkpoint.async_mode=async"), "a rank: copies that are written beside the steps"),
        (("tracker=tensorboard",), "/tensorboard"),
    ],
)
def test_a_line_that_only_some_plans_have(plan_of, words, line):
    assert line in render_plan(plan_of(*words))
    assert line not in render_plan(plan_of("tracker=local"))


def test_a_pasted_command_is_the_command():
    script = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['A'], os.environ['B']]))"
    words = ("--flag", "a b", "$HOME", "it's", "*", "", "\\", "--long=" + "x" * 150, "ü")
    command = Command(argv=(sys.executable, "-c", script, *words), env={"A": "1 $2 'x'", "B": "y" * 150})
    text = "\n".join(f"    {line}" for line in shell_lines(command))
    done = subprocess.run(["/bin/sh", "-c", text], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == [list(words), command.env["A"], command.env["B"]]
