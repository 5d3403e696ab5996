"""``launch deploy promote|rollback DIR`` by the real kubectl, before an API server in memory and a Prometheus' API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config.snapshot import load_run
from launcher.deploy.canary import promote
from launcher.deploy.canary.routes import ANNOTATION
from launcher.deploy.folder import update, write
from tests.conftest import Launch
from tests.deploy.conftest import Render
from tests.deploy.kubernetes.api_server import ApiServer
from tests.deploy.kubernetes.test_cluster import api, needs_kubectl
from tests.deploy.prometheus_api import Measured, PrometheusApi, prometheus_api

__all__ = ("api",)

pytestmark = needs_kubectl
ROUTES = {"istio": ("virtualservices", "chat"), "gateway": ("httproutes", "chat")}
WORDS = ("deploy.name=chat", "deploy.gateway=a/b", "deploy.hostnames=[m.example.org]")
NEW = ("deploy.version=v2", "deploy.baseline=v1", "deploy.canary_steps=[20,100]", "deploy.canary_checks=2")
NEW_VERSION, BASELINE = 'version="v2"', 'version="v1"'
Sleep = Callable[[float], None]


@pytest.fixture
def measured() -> Iterator[PrometheusApi]:
    with prometheus_api() as server:
        server.versions |= {NEW_VERSION: Measured(), BASELINE: Measured()}
        yield server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[Sleep]:
    """What happens in the pauses between checks, one after the other; then nothing."""
    actions: list[Sleep] = []
    monkeypatch.setattr(promote, "_wait", lambda seconds: actions.pop(0)(seconds) if actions else None)
    return actions


@pytest.fixture
def deployed(
    launch_in_process: Launch, rendered: Render, api: ApiServer, measured: PrometheusApi, tmp_path: Path
) -> Callable[[str], Path]:
    """Apply a baseline and a new version; return the folder of the new one."""

    def make(traffic: str) -> Path:
        folders = {"v1": (), "v2": (*NEW, f"deploy.canary_prometheus={measured.address}")}
        for name, words in folders.items():
            write(tmp_path / name, rendered(*WORDS, f"deploy.traffic={traffic}", *words)[2])
            launch_in_process("deploy", "apply", str(tmp_path / name)).expect(0)
        return tmp_path / "v2"

    return make


def shares(api: ApiServer, traffic: str) -> dict[str, int]:
    """Return the weights in the cluster."""
    spec = api.objects[ROUTES[traffic]]["spec"]
    if traffic == "istio":
        return {each["destination"]["subset"]: each["weight"] for each in spec["http"][0]["route"]}
    return {each["name"].removeprefix("chat-"): each["weight"] for each in spec["rules"][0]["backendRefs"]}


def progress(api: ApiServer, traffic: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(api.objects[ROUTES[traffic]]["metadata"]["annotations"][ANNOTATION])
    return found


@pytest.mark.parametrize("traffic", ROUTES)
def test_a_good_version_is_promoted_and_the_folder_agrees(
    launch_in_process: Launch, deployed: Callable[[str], Path], api: ApiServer, pauses: list[Sleep], traffic: str
) -> None:
    folder = deployed(traffic)
    assert shares(api, traffic) == {"v1": 100, "v2": 0}
    seen: list[dict[str, int]] = []
    pauses += [lambda _: seen.append(shares(api, traffic))] * 4
    shown = launch_in_process("deploy", "promote", str(folder)).expect(0).stdout
    assert seen == [{"v1": 80, "v2": 20}] * 2 + [{"v1": 0, "v2": 100}] * 2
    assert "v2 is promoted" in shown
    assert "share of failed requests 0 % (at most 1 %)" in shown
    assert shares(api, traffic) == {"v1": 0, "v2": 100}
    assert load_run(folder / "run.yaml").deploy.weights == {"v1": 0, "v2": 100}
    launch_in_process("deploy", "apply", str(folder), "--diff").expect(1)  # but for the record of the promotion
    launch_in_process("deploy", "apply", str(folder)).expect(0)
    assert shares(api, traffic) == {"v1": 0, "v2": 100}
    assert "gets all requests already" in launch_in_process("deploy", "promote", str(folder)).expect(0).stdout


BAD = {
    "failures": (Measured(failure_share=0.2), "share of failed requests 20 % (at most 1 %)"),
    "first token": (Measured(ttft_p95_s=3.0), "p95 time to first token 3 s (at most 2.5 s)"),
    "slower": (Measured(between_tokens_s=0.04), "time between tokens beside the baseline 0.04 s (at most 0.03 s)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_version_goes_back_and_the_failed_gate_is_printed(
    launch_in_process: Launch,
    deployed: Callable[[str], Path],
    api: ApiServer,
    measured: PrometheusApi,
    pauses: list[Sleep],
    case: str,
) -> None:
    folder = deployed("istio")
    measured.versions[NEW_VERSION], message = BAD[case]
    shown = launch_in_process("deploy", "promote", str(folder)).expect(1).stdout
    assert "failed 1 of 2" in shown
    last = shown.splitlines()[-1]
    assert "rolled back: v1 gets all requests" in last
    assert message in last
    assert any(query in last for query in measured.queries if NEW_VERSION in query and "rate" in query)
    assert shares(api, "istio") == {"v1": 100, "v2": 0}
    assert message in launch_in_process("deploy", "status", str(folder)).expect(0).stdout


def test_too_few_requests_are_not_judged_until_the_deadline(
    launch_in_process: Launch,
    deployed: Callable[[str], Path],
    api: ApiServer,
    measured: PrometheusApi,
    pauses: list[Sleep],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = deployed("istio")
    measured.versions[NEW_VERSION] = Measured(requests_per_s=0.005, failure_share=1.0)  # 18 in an hour
    now = time.time()
    monkeypatch.setattr(promote, "_now", lambda: now)

    def wait(_: float) -> None:
        nonlocal now
        assert shares(api, "istio") == {"v1": 80, "v2": 20}
        now += 4000

    pauses += [lambda _: None, lambda _: None, wait]
    shown = launch_in_process("deploy", "promote", str(folder)).expect(124).stdout
    assert shown.count("not judged: 0 requests, and deploy.canary_min_requests=20") == 2
    assert "nothing could be judged for deploy.canary_deadline_s=3600: 18 requests, and" in shown
    assert shares(api, "istio") == {"v1": 100, "v2": 0}


def test_an_interrupted_promotion_goes_on_where_it_was(
    launch_in_process: Launch, deployed: Callable[[str], Path], api: ApiServer, pauses: list[Sleep]
) -> None:
    folder = deployed("gateway")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    pauses += [lambda _: None, interrupt]
    assert "goes on" in launch_in_process("deploy", "promote", str(folder)).expect(130).stdout
    assert (shares(api, "gateway"), progress(api, "gateway")["passed"]) == ({"v1": 80, "v2": 20}, 1)
    shown = launch_in_process("deploy", "status", str(folder)).expect(0).stdout
    assert "v2 gets 20 % of the requests, v1 80 %" in shown
    assert "1 of 2 checks passed at this step, 0 of 2 failed" in shown
    pauses += [lambda _: None, interrupt]  # one check is left of this step
    launch_in_process("deploy", "promote", str(folder)).expect(130)
    assert shares(api, "gateway") == {"v1": 0, "v2": 100}


def test_a_route_that_another_client_changes_is_left_alone(
    launch_in_process: Launch, deployed: Callable[[str], Path], api: ApiServer, pauses: list[Sleep]
) -> None:
    folder = deployed("istio")

    def change(_: float) -> None:
        api.objects[ROUTES["istio"]]["metadata"]["resourceVersion"] = "changed"

    pauses.append(change)
    assert "it has been modified" in launch_in_process("deploy", "promote", str(folder)).expect(2).stderr
    assert shares(api, "istio") == {"v1": 80, "v2": 20}


def test_rollback_then_delete(
    launch_in_process: Launch, deployed: Callable[[str], Path], api: ApiServer, pauses: list[Sleep], tmp_path: Path
) -> None:
    folder = deployed("istio")
    launch_in_process("deploy", "promote", str(folder)).expect(0)
    refused = launch_in_process("deploy", "delete", str(folder)).expect(2)
    assert "chat-v2 gets 100 % of the requests, beside v1" in refused.stderr
    assert "rolled back from 100 %" in launch_in_process("deploy", "rollback", str(folder)).expect(0).stdout
    assert shares(api, "istio") == {"v1": 100, "v2": 0}
    assert load_run(folder / "run.yaml").deploy.weights == {"v1": 100, "v2": 0}
    launch_in_process("deploy", "delete", str(folder)).expect(0)
    assert ("deployments", "chat-v1") in api.objects
    assert ("services", "chat") in api.objects
    launch_in_process("deploy", "delete", str(tmp_path / "v1")).expect(0)
    assert api.objects == {}


def test_what_cannot_be_promoted_changes_nothing(
    launch_in_process: Launch,
    rendered: Render,
    deployed: Callable[[str], Path],
    api: ApiServer,
    measured: PrometheusApi,
    pauses: list[Sleep],
    tmp_path: Path,
) -> None:
    alone = tmp_path / "alone"
    write(alone, rendered(*WORDS, "deploy.traffic=istio", *NEW)[2])
    refused = launch_in_process("deploy", "apply", str(alone)).expect(2).stderr
    assert "deploy.baseline=v1: chat-v1 is not in default, and would get 100 % of the requests" in refused
    assert (
        "deploy.canary_prometheus: gates are read"
        in launch_in_process("deploy", "promote", str(alone)).expect(2).stderr
    )
    assert "routes nothing to v1 and v2" in launch_in_process("deploy", "rollback", str(alone)).expect(2).stderr
    assert api.objects == {}
    folder = deployed("istio")
    before = yaml.safe_dump(api.objects[ROUTES["istio"]])
    without = launch_in_process("deploy", "promote", str(tmp_path / "v1")).expect(2).stderr
    assert "was rendered without a canary; render the new version with deploy.baseline=VERSION" in without
    del api.objects["deployments", "chat-v2"]
    assert "chat-v2 is not in default; nothing was changed" in (
        launch_in_process("deploy", "promote", str(folder)).expect(2).stderr
    )
    text = (folder / "run.yaml").read_text()
    update(folder, {"run.yaml": text.replace(measured.address, "http://127.0.0.1:1")})
    assert "Prometheus cannot be reached" in launch_in_process("deploy", "promote", str(folder)).expect(2).stderr
    assert yaml.safe_dump(api.objects[ROUTES["istio"]]) == before
