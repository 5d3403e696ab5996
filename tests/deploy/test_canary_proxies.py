"""Canaries behind the real nginx and HAProxy: weights while they run, and a rehearsal with a real Prometheus."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from canary_rehearsal import BAD_STEP_S, GOOD_STEP_S, rehearse, scraping
from load_balancer import rendered_files

from launcher.deploy.canary.progress import Progress
from launcher.deploy.canary.promote import open_canary
from launcher.deploy.folder import write
from launcher.errors import ConfigErrors, EnvironmentProblem
from tests.conftest import Launch
from tests.deploy.monitoring.rendered import PROMETHEUS
from tests.deploy.proxies import FILES, KINDS, LoadBalancer, program, rendered
from tests.deploy.upstreams import Upstream, answer
from tests.helpers import wait_for
from tests.inference.server.conftest import start
from tests.ports import free_port
from tests.processes import kill_marked


@pytest.fixture
def servers() -> Iterator[list[Upstream]]:
    """Two servers of a baseline, and one of a new version."""
    with contextlib.ExitStack() as stack:
        found = [Upstream(answer) for _ in range(3)]
        for each in found:
            stack.callback(each.close)
        yield found


def words_of(kind: str, folder: Path, servers: list[Upstream]) -> list[str]:
    first, second, new = (each.address for each in servers)
    own = [f"deploy.admin_socket={folder}/admin.sock"] if kind == "haproxy" else []
    return [
        f"deploy.upstreams=[{first},{second}]",
        f"deploy.canary_upstreams=[{new}]",
        "deploy.canary_percent=10",
        "deploy.canary_prometheus=http://127.0.0.1:1",
        *own,
    ]


def counts(proxy: LoadBalancer, servers: list[Upstream], *, num_requests: int) -> list[int]:
    """Send requests, one after the other; return how many each server got."""
    before = [len(each.requests) for each in servers]
    for _ in range(num_requests):
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
        connection.request("POST", "/v1/completions", b"{}", {"Connection": "close"})
        with connection.getresponse() as response:
            assert response.status == 200
            response.read()
    return [len(each.requests) - number for each, number in zip(servers, before, strict=True)]


def is_close(found: list[int], wanted: list[int]) -> bool:
    """Whether each server got its share, to one request: HAProxy begins a round anywhere. None is none."""
    pairs = list(zip(found, wanted, strict=True))
    return all(abs(one - other) <= 1 for one, other in pairs) and all(one == 0 for one, other in pairs if not other)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_exact_and_change_while_it_runs(
    kind: str, servers: list[Upstream], tmp_path: Path, launch_in_process: Launch
) -> None:
    program(kind)
    with contextlib.closing(LoadBalancer(kind, tmp_path, words_of(kind, tmp_path, servers))) as proxy:
        assert is_close(counts(proxy, servers, num_requests=20), [9, 9, 2])
        canary = open_canary(tmp_path)
        assert canary.split.read().percent == 10
        assert canary.split.problem() is None
        for percent, expected in {50: [5, 5, 10], 100: [0, 0, 20]}.items():
            canary.split.write(Progress(version=canary.split.version, percent=percent, since=0.0, judged=0.0))
            wait_for(lambda wanted=expected: is_close(counts(proxy, servers, num_requests=20), wanted), seconds=60)
            live = open_canary(tmp_path).split.read()
            assert live.progress is not None
            assert (live.percent, live.progress.percent) == (percent, percent)
        shown = launch_in_process("deploy", "rollback", str(tmp_path)).expect(0).stdout
        assert "rolled back from 100 %: baseline gets all requests, canary none" in shown
        wait_for(lambda: is_close(counts(proxy, servers, num_requests=20), [10, 10, 0]), seconds=60)
        assert (
            "canary gets 0 % of the requests" in launch_in_process("deploy", "status", str(tmp_path)).expect(0).stdout
        )
        servers[2].is_ready = False
        assert "no server of deploy.canary_upstreams is ready" in (canary.split.problem() or "")
        (tmp_path / FILES[kind]).write_text("# mine\n")
        refused = launch_in_process("deploy", "promote", str(tmp_path)).expect(2).stderr
        assert f"{FILES[kind]} was changed since launch deploy wrote it" in refused


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_balancer_that_does_not_run_is_an_error(kind: str, servers: list[Upstream], tmp_path: Path) -> None:
    program(kind)
    LoadBalancer(kind, tmp_path, words_of(kind, tmp_path, servers)).close()
    canary = open_canary(tmp_path)
    with pytest.raises(EnvironmentProblem, match="start it with"):
        canary.split.write(Progress(version=canary.split.version, percent=50, since=0.0, judged=0.0))
    assert open_canary(tmp_path).options.canary_share == 10, "the file is as it was"


@pytest.mark.skipif(PROMETHEUS is None, reason="Debian's prometheus is not installed")
def test_a_bad_version_is_rolled_back_and_a_good_one_promoted(tmp_path: Path) -> None:
    """HAProxy before the bad one, nginx before the good one, whose promotion is killed and started again."""
    for kind in KINDS:
        program(kind)
    ports, served = [free_port() for _ in range(3)], []
    try:
        for name, port, step_s in zip(
            ("baseline", "bad", "good"), ports, (GOOD_STEP_S, BAD_STEP_S, GOOD_STEP_S), strict=True
        ):
            words = (f"job.echo_step_s={step_s}", "job.result_cache_bytes=0")
            served.append(start(tmp_path / name, *words, port=port, wait=False))
        for each in served:
            wait_for(each.ready, seconds=240, process=each.process, shown=lambda each=each: each.output)
        few = ("deploy.canary_interval_s=3", "deploy.canary_min_requests=4", "deploy.canary_steps=[50,100]")
        words = (*few, "deploy.canary_checks=1", "deploy.canary_failure_limit=2")
        with scraping(tmp_path / "prometheus", ports) as prometheus:
            keywords = {"baseline": ports[0], "prometheus": prometheus, "words": words}
            bad = rehearse("haproxy", tmp_path / "h", new=ports[1], **keywords)
            good = rehearse("nginx", tmp_path / "n", new=ports[2], kill_at="gets 50 %", **keywords)
    finally:
        for each in served:
            each.http.close()
            kill_marked(each.mark)
            each.process.wait()
    assert (bad.code, bad.percent) == (1, 0), bad.lines
    assert "tokens/s of a stream" in bad.lines[-1]
    assert "(at least 3)" in bad.lines[-1]
    assert "inter_token_latency_seconds" in bad.lines[-1]
    assert (good.code, good.percent) == (0, 100), good.lines
    starts = [line.partition(" ")[2] for line in good.lines if " gets " in line]
    assert starts[0] == "canary gets 50 % of the requests"
    assert starts[1].startswith("canary gets 50 % of the requests; 0 of 1 checks passed")


REFUSED = {
    "a canary without options": (("deploy.canary_percent=5",), "deploy.canary_percent"),
    "gates without a canary": (("deploy.canary_checks=5",), "deploy.canary_checks"),
    "a server of both": (("deploy.canary_upstreams=['127.0.0.1:8000']",), "deploy.canary_upstreams[0]"),
    "the same server": (("deploy.upstreams=[a:1]", "deploy.canary_upstreams=[A:1]"), "deploy.canary_upstreams[0]"),
    "no address": (("deploy.canary_upstreams=[a]",), "deploy.canary_upstreams[0]"),
    "more than all": (("deploy.canary_upstreams=[a:1]", "deploy.canary_percent=101"), "deploy.canary_percent"),
    "steps that fall": (("deploy.canary_upstreams=[a:1]", "deploy.canary_steps=[50,5,100]"), "deploy.canary_steps"),
    "steps that end early": (("deploy.canary_upstreams=[a:1]", "deploy.canary_steps=[5,50]"), "deploy.canary_steps"),
    "no steps": (("deploy.canary_upstreams=[a:1]", "deploy.canary_steps=[]"), "deploy.canary_steps"),
    "no checks": (("deploy.canary_upstreams=[a:1]", "deploy.canary_checks=0"), "deploy.canary_checks"),
    "an early deadline": (("deploy.canary_upstreams=[a:1]", "deploy.canary_deadline_s=5"), "deploy.canary_deadline_s"),
    "a share": (("deploy.canary_upstreams=[a:1]", "deploy.canary_failure_share=1.5"), "deploy.canary_failure_share"),
    "a slowdown": (("deploy.canary_upstreams=[a:1]", "deploy.canary_slowdown=0.5"), "deploy.canary_slowdown"),
    "a login": (
        ("deploy.canary_upstreams=[a:1]", "deploy.canary_prometheus='http://a:b@c'"),
        "deploy.canary_prometheus",
    ),
    "a gate that never fails": (
        ("deploy.canary_upstreams=[a:1]", "deploy.canary_ttft_p95_s=100"),
        "deploy.canary_ttft_p95_s",
    ),
    "no gates": (
        (
            *("deploy.canary_upstreams=[a:1]", "deploy.canary_failure_share=null", "deploy.canary_ttft_p95_s=null"),
            "deploy.canary_slowdown=null",
        ),
        "deploy.canary_failure_share",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_canary_without_sense_is_refused_by_its_option(case: str) -> None:
    words, option = REFUSED[case]
    with pytest.raises(ConfigErrors) as caught:
        rendered("nginx", words)
    assert option in [error.option for error in caught.value.errors]


def test_a_rollback_beside_a_promotion_is_not_undone(tmp_path: Path) -> None:
    """The reload of nginx is left out."""
    words = ("deploy.canary_upstreams=[a:1]", "deploy.canary_percent=10")
    write(tmp_path, rendered_files("nginx", words))
    promoting, other = (open_canary(tmp_path).split for _ in range(2))
    for each in (promoting, other):
        each._nginx = lambda *_: None  # type: ignore[union-attr,method-assign]
    at = Progress(version=promoting.version, percent=50, since=0.0, judged=0.0)
    promoting.read()
    promoting.write(at)
    promoting.write(replace(at, passed=1))
    other.read()
    other.write(replace(at, percent=0, state="rolled_back"))
    with pytest.raises(EnvironmentProblem, match="another launch deploy changed the weights meanwhile"):
        promoting.write(replace(at, percent=100))
    assert open_canary(tmp_path).split.read().percent == 0


def test_haproxy_needs_its_socket_and_enough_weight() -> None:
    for words, option in {
        ("deploy.canary_upstreams=[a:1]",): "deploy.admin_socket",
        ("deploy.canary_upstreams=[a:1]", "deploy.admin_socket='/run/a b'"): "deploy.admin_socket",
        ("deploy.canary_upstreams=[a:1]", f"deploy.admin_socket=/{'a' * 100}"): "deploy.admin_socket",
        (
            f"deploy.upstreams=[{','.join(f'a{at}:1' for at in range(200))}]",
            *("deploy.canary_upstreams=[b:1]", "deploy.canary_steps=[99,100]", "deploy.admin_socket=/run/a.sock"),
        ): "deploy.canary_steps",
    }.items():
        with pytest.raises(ConfigErrors) as caught:
            rendered("haproxy", words)
        assert option in [error.option for error in caught.value.errors]
