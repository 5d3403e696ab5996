"""A real Prometheus scrapes a real server and a real training run: panels have data, alerts fire."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import draw_panels
import httpx
import pytest
from monitored_runs import monitoring_folder, running_prometheus

from tests.conftest import Background, Start, running_in_background
from tests.deploy.monitoring.rendered import PROMETHEUS, SERVER, TRAINING_RUN
from tests.helpers import wait_for
from tests.inference.server.conftest import Served, _starter
from tests.ports import free_port

pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="Debian's prometheus is not installed")
SMALL = (
    *("model.num_hidden_layers=1", "model.hidden_size=64", "model.num_attention_heads=2"),
    *("model.max_position_embeddings=64", "job.sequence_length=16", "job.micro_batch=2", "job.steps=100000"),
    *("job.eval_every=20", "job.eval_sequences=4", "job.sample_tokens=0", "job.peak_tflops=1", "backend.ranks=1"),
)
ENGINE = ("job.engine=paged", "job.warm_up=[[1,4]]", "job.kv_cache_tokens=2048", "job.max_num_seqs=4")
VARIABLES = {"$__rate_interval": "15s", "$job": ".*", "$run_name": ".*", "$run_id": ".*"}


@dataclass(frozen=True)
class Scraped:
    """A Prometheus with what it scrapes."""

    api: httpx.Client
    server: Served
    training: Background
    boards: Mapping[str, Any]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each series of an instant query."""
        for name, value in VARIABLES.items():
            expr = expr.replace(name, value)
        answer = self.api.get("/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", (expr, answer)
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def firing(self) -> set[str]:
        """Return the names of alerts that fire."""
        return {labels["alertname"] for labels, _ in self.query('ALERTS{alertstate="firing"}')}


@contextmanager
def traffic(server: Served) -> Iterator[None]:
    """Send the server requests, of which every other one is answered from its result cache."""
    ended = threading.Event()

    def send() -> None:
        number = 0
        while not ended.wait(0.05):
            try:
                server.complete(f"abcdefgh {number // 2}" * 5)
            except httpx.TransportError:  # a test has ended it
                return
            number += 1

    thread = threading.Thread(target=send)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory, preloading: Start) -> Iterator[Scraped]:
    """Serve and train until the tests are over."""
    folder = tmp_path_factory.mktemp("monitoring")
    port = free_port()
    tracker = ("tracker=prometheus", f"tracker.port={port}", "run.name=tiny")
    starter = _starter(lambda: tmp_path_factory.mktemp("served"))
    with running_in_background(folder, preloading) as launch:
        training = launch(*tracker, *SMALL)
        server = next(starter)(*ENGINE)
        every = "deploy.scrape_every_s=1"
        serving = (*SERVER, every, "deploy.slo_ttft_s=0.001", f"deploy.targets=[127.0.0.1:{server.port}]")
        monitoring_folder(
            folder, (serving, (*TRAINING_RUN, every, "deploy.name=training", f"tracker.port={port}")), divide=60
        )
        boards = {path.stem: json.loads(path.read_text()) for path in folder.glob("grafana/dashboards/*.json")}
        training.wait_for_output("step 1/")
        with running_prometheus(folder) as url, httpx.Client(base_url=url, timeout=30) as api, traffic(server):
            yield Scraped(api, server, training, boards)
    next(starter, None)


def test_every_query_of_every_panel_returns_data(scraped: Scraped) -> None:
    queries = {
        target["expr"]: f"{board['title']}: {panel['title']}"
        for board in scraped.boards.values()
        for panel in board["panels"]
        for target in panel["targets"]
    }
    assert len(queries) > 40
    missing = dict(queries)

    def complete() -> bool:
        for expr in list(missing):
            if any(map(math.isfinite, (value for _, value in scraped.query(expr)))):
                del missing[expr]
        return not missing

    begin = time.time()
    wait_for(complete, seconds=180, shown=lambda: missing)
    for board in scraped.boards.values():

        def drawn(board: dict[str, Any] = board) -> str:
            """Return the picture once the points in it, which are seconds apart, meet those of every query."""
            picture = draw_panels.drawn(str(scraped.api.base_url), board, begin=begin - 5, end=time.time())
            if "no data" in picture:
                time.sleep(1)
                return ""
            return picture

        picture = wait_for(drawn, seconds=60)
        assert all(panel["title"] in picture for panel in board["panels"])
    for board in scraped.boards.values():
        for variable in board["templating"]["list"][1:]:
            metric, label = variable["query"]["query"].removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
            assert all(labels[label] for labels, _ in scraped.query(metric)), variable


def test_alerts_fire_on_what_they_are_about_and_end(scraped: Scraped) -> None:
    """First tokens that take over a millisecond; an engine, a rank and then a server that are killed.

    Windows and waits are 60 times shorter than rendered.
    """

    def becomes(alert: str, *, fires: bool) -> None:
        wait_for(lambda: (alert in scraped.firing()) is fires, seconds=180, shown=scraped.firing)

    becomes("ServingTtftBudgetBurnsFast", fires=True)
    unprovoked = {"ServingRestarts", "ServingDown", "ServingErrorBudgetBurnsFast", "TrainingFailed", "TrainingStalled"}
    assert not scraped.firing() & unprovoked
    scraped.server.replicas()[0].kill()
    becomes("ServingRestarts", fires=True)
    scraped.training.ranks()[0].kill()
    becomes("TrainingFailed", fires=True)
    becomes("ServingRestarts", fires=False)
    scraped.server.process.send_signal(signal.SIGKILL)
    becomes("ServingDown", fires=True)
