"""The argv of both agents, tried for real with a stand-in for the rank that prints what it was given."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from launcher.planning.commands import AGENTS, RANK_MODULE, cuda_visible_devices
from launcher.protocol.plan import Host, RunIdentity
from tests.ports import free_port

STAND_IN = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
os.write(1, (json.dumps({"argv": sys.argv[1:], **{name: os.environ.get(name) for name in names}}) + "\\n").encode())
"""
HOST = Host(name="box", slots=2, cores=2, python=sys.executable)


def start(agent, folder, identity):
    """Run the agent of one host with the stand-in instead of the rank."""
    (folder / "stand_in.py").write_text(STAND_IN)
    (argv,) = AGENTS[agent]([HOST], identity)
    argv = ["stand_in" if word == RANK_MODULE else word for word in argv]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("agent", AGENTS)
def test_ranks_start_with_their_numbers_and_the_run_directory_alone(agent, tmp_path):
    port = free_port()
    run_dir = str(tmp_path / "--nnodes a b")  # looks like a flag of torchrun's, and holds spaces
    done = start(agent, tmp_path, RunIdentity(run_id="x", run_dir=run_dir, run_hash="ab", port=port))
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ranks = sorted(printed, key=lambda rank: rank["RANK"])
    assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [("0", "0"), ("1", "1")]
    assert all(rank["WORLD_SIZE"] == "2" for rank in ranks)
    assert all(rank["argv"] == [run_dir] for rank in ranks)
    assert all((rank["MASTER_ADDR"], rank["MASTER_PORT"]) == ("127.0.0.1", str(port)) for rank in ranks)
    if agent == "deepspeed":  # it always sets this one: nothing may become visible that was not
        assert all(rank["CUDA_VISIBLE_DEVICES"] == "-1,-1" for rank in ranks)


def test_torchrun_fails_at_once_when_the_port_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        identity = RunIdentity(run_id="x", run_dir="/x", run_hash="ab", port=taken.getsockname()[1])
        done = start("torchrun", tmp_path, identity)
    assert done.returncode != 0
    assert "Address already in use" in done.stderr, "what supervision tries another port after"
    assert "{" not in done.stdout


def test_each_host_gets_its_number_and_the_address_of_the_first():
    hosts = [replace(HOST, name=name, address=address) for name, address in (("a", "10.0.0.1"), ("b", "10.0.0.2"))]
    identity = RunIdentity(run_id="x", run_dir="/x", run_hash="ab", port=29500)
    second = AGENTS["torchrun"](hosts, identity)[1]
    assert second[second.index("--node-rank") + 1] == "1"
    assert second[second.index("--nnodes") + 1] == "2"
    assert second[second.index("--master-addr") + 1] == "10.0.0.1"
    second = AGENTS["deepspeed"](hosts, identity)[1]
    assert {"--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29500"} <= set(second)


def test_devices_keep_the_names_the_user_gave_them():
    host = Host(name="x", slots=2, devices=("a", "b", "c"), device_ids=("3", "GPU-ab", "5"))
    assert cuda_visible_devices(host) == [3, "GPU-ab"]
    assert cuda_visible_devices(Host(name="x", slots=2)) == []
