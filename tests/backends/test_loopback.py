"""A run on one machine listens nowhere that another machine reaches."""

from __future__ import annotations

import signal
from collections.abc import Callable

import psutil
import pytest

from tests.conftest import Background
from tests.processes import marked

SMALL = (
    *(
        "model.num_hidden_layers=1",
        "model.hidden_size=32",
        "model.max_position_embeddings=32",
        "tracker=local",
        "data=synthetic",
        "backend.threads=1",
    ),
    *("job.sequence_length=16", "job.micro_batch=1", "job.eval_sequences=2", "job.sample_tokens=2", "job.log_every=1"),
    *("schedule=constant", "checkpoint.at_end=false", "job.steps=1000000", "backend.ranks=2"),
)


def listening(mark: str) -> list[tuple[str, str]]:
    """Return the address and the command of every TCP socket that processes of a run listen on."""
    found = []
    for process in marked(mark):
        command = " ".join(process.cmdline()[:4])
        sockets = process.net_connections(kind="tcp")
        found += [(one.laddr.ip, command) for one in sockets if one.status == psutil.CONN_LISTEN]
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("backend.agent=torchrun", "parallel=ddp"),
        ("backend.agent=deepspeed", "parallel=zero2", "optimizer.implementation=torch"),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_no_port_is_open_beyond_the_loopback_interface(
    launch_forked_in_background: Callable[..., Background], words: tuple[str, ...]
) -> None:
    run = launch_forked_in_background(*SMALL, *words)
    run.wait_for_output("step 1/")
    found = listening(run.mark)
    run.send_signal(signal.SIGINT)
    assert run.wait() == 130
    assert found, "ranks that meet listen somewhere"
    assert {address for address, _ in found} == {"127.0.0.1"}, found
