"""What a user's environment holds arrives in the ranks unchanged, whichever way they are started.

The same over ssh: ``test_ssh.py``; in a Slurm job: ``tests/slurm``; in pods: ``tests/kubernetes``.
"""

import re
import signal
from pathlib import Path

import pytest

from tests.torchless import endless, wait_for_answers


def memories(run_dir):
    """Return the environment block and the heap of every rank of a run, on whichever host, by rank.

    Ranks behind pdsh read their variables from the run directory and set them themselves; what they have set is on the
    heap, as the C library keeps it: ``NAME=value`` and a zero byte.
    """
    words, found = {"launcher.jobs.rank", "launcher.jobs.external_rank"}, {}
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or words.isdisjoint((entry / "cmdline").read_bytes().decode().split("\0")):
                continue
            if (entry / "cwd").resolve() != run_dir.parent:
                continue
            memory = (entry / "environ").read_bytes() + heap_of(entry)
        except OSError:
            continue
        if rank := re.search(rb"\0RANK=(\d+)\0", memory):
            found[int(rank[1])] = memory
    return found


def heap_of(entry):
    lines = [line.split() for line in (entry / "maps").read_text().splitlines()]
    start, end = next(words[0] for words in lines if words[-1] == "[heap]").split("-")
    with (entry / "mem").open("rb", buffering=0) as memory:
        memory.seek(int(start, 16))
        return memory.read(int(end, 16) - int(start, 16))


@pytest.mark.parametrize("backend", ["local", "pdsh"])
def test_500_strings_arrive_in_every_rank(
    backend, lab_hosts, launch_in_background, tmp_path, monkeypatch, nasty_strings
):
    sent = {f"HF_NASTY_{number}": value for number, value in enumerate(nasty_strings)}
    for name, value in sent.items():
        monkeypatch.setenv(name, value)
    words = ["backend.ranks=2"]
    if backend == "pdsh":
        lab = lab_hosts(2)
        words = ["backend=deepspeed", f"backend.hostfile={lab.hostfile}", f"backend.ssh_config={lab.ssh_config}"]
    running = launch_in_background(*endless(tmp_path), *words, "run.dir=nasty")
    wait_for_answers(tmp_path / "nasty")
    found = memories(tmp_path / "nasty")
    assert sorted(found) == [0, 1]
    for memory in found.values():
        absent = [name for name, value in sent.items() if f"{name}={value}\0".encode() not in memory]
        assert absent == []
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=120) == 130
