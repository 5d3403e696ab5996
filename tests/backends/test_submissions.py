"""Submissions as text, compared whole with files (``UPDATE_GOLDEN=1 pytest`` rewrites them), and how they grow."""

import json
import os
import sys
from pathlib import Path

import pytest

from launcher.backends.registry import executor_of
from launcher.config.compose import compose
from launcher.protocol.plan import Host
from launcher.utils.schema import to_tree
from tests.conftest import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "golden"
CLUSTERS = {
    "ssh": ("backend=ssh", "backend.ssh_options=[-i,/keys/my key]"),
    "deepspeed": ("backend=deepspeed",),
    "slurm": ("backend=slurm", "backend.nodes={count}", "backend.ranks=8"),
    "kubernetes": (
        "backend=kubernetes",
        "backend.image=registry.example/x:1",
        "backend.nodes={count}",
        "backend.ranks=8",
    ),
}


@pytest.fixture(autouse=True)
def plain_paths(monkeypatch):
    """The checkout may have any path, and deepspeed refuses some."""
    for module in ("config.backend.deepspeed", "backends.deepspeed", "backends.ssh"):
        monkeypatch.setattr(f"launcher.{module}.code_root", lambda: Path("/checkout"))
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")


def planned(plan_of, backend, count):
    words = (
        "+exp=zero2_gpt2_large",
        "job.global_batch=null",
        *(word.format(count=count) for word in CLUSTERS[backend]),
    )
    hosts = [
        Host(
            name=f"node{n:04}", ssh_destination=f"node{n:04}", slots=8, is_probed=False, cores=0, address=f"node{n:04}"
        )
        for n in range(count)
    ]
    run = compose(words).run
    if backend in ("slurm", "kubernetes"):
        hosts = run.backend.hosts(max_ranks=None)
    return run, plan_of(*words, hosts=hosts, NCCL_DEBUG="INFO", HF_TOKEN="hunter2", WANDB_API_KEY="h" * 40)


@pytest.mark.parametrize("backend", ["ssh", "deepspeed"])
def test_the_submission_is_as_it_was(plan_of, backend):
    run, plan = planned(plan_of, backend, 2)
    text = executor_of(run).render(plan, snapshot="")
    for path, shown in ((sys.executable, "PYTHON"), ("/checkout", "ROOT")):
        text = text.replace(path, shown)
    file = GOLDEN / f"submission_by_{backend}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", CLUSTERS)
def test_a_plan_grows_in_proportion_to_its_hosts(plan_of, backend):
    sizes = {}
    for count in (32, 128):
        run, plan = planned(plan_of, backend, count)
        text = json.dumps(to_tree(plan)) + executor_of(run).render(plan, snapshot="")
        assert "hunter2" not in text
        assert "h" * 40 not in text
        sizes[count] = len(text)
    assert sizes[128] < 4.2 * sizes[32]
