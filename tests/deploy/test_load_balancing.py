"""Two real servers behind the real nginx and HAProxy under load: one killed, one drained, both replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from load_balancing import rehearse, table

from tests.deploy.proxies import KINDS, LoadBalancer, program
from tests.inference.server.conftest import MODEL, Served, start
from tests.ports import free_port
from tests.processes import kill_marked, marked

_REQUESTS = 48
"""Of each phase: three rounds of all streams."""


@dataclass
class Replica:
    """One real server, as the rehearsal ends it."""

    served: Served

    def kill(self) -> None:
        """Kill all its processes."""
        kill_marked(self.served.mark)

    def terminate(self) -> int | None:
        """Drain."""
        return self.served.stop()


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Replica]]:
    """Collect servers, whose processes are killed in the end."""
    started: list[Replica] = []
    yield started
    for each in started:
        each.served.http.close()
        kill_marked(each.served.mark)
        each.served.process.wait()


def test_no_request_fails_that_had_sent_no_token(replicas: list[Replica], tmp_path: Path) -> None:
    for kind in KINDS:
        program(kind)
    ports = [free_port(), free_port()]

    def begin(port: int) -> Replica:
        words = ("job.echo_step_s=0.02", "job.result_cache_bytes=0")
        replicas.append(Replica(start(tmp_path / f"server{len(replicas)}", *words, port=port)))
        return replicas[-1]

    upstreams = f"deploy.upstreams=[{','.join(f'127.0.0.1:{port}' for port in ports)}]"
    balancers = [LoadBalancer(kind, tmp_path / kind, [upstreams]) for kind in KINDS]
    try:
        urls = [each.url for each in balancers]
        results, code = rehearse(urls, ports, start=begin, model=MODEL, num_requests=_REQUESTS)
    finally:
        for each in balancers:
            each.close()
    assert code == 0
    killed, drained, *replacements = replicas
    assert not list(marked(killed.served.mark)), "it was killed"
    for kind, phases in zip(KINDS, results, strict=True):
        shown = "\n".join([kind, *table(kind, phases), *(f"{each.why}" for phase in phases for each in phase.failed)])
        assert not [each for phase in phases for each in phase.failed], shown
        assert [bool(phase.cut) for phase in phases] == [False, True, False, False, False], shown
        assert len(phases[1].cut) <= 16, shown
        assert all(len(phase.good) >= _REQUESTS // 2 for phase in phases), shown
    assert "0 requests failed" not in drained.served.output
    assert all(each.served.metric("request_success_total") > 0 for each in replacements)
    assert psutil.pid_exists(replacements[0].served.process.pid)
