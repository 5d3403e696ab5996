"""The page that Prometheus scrapes, read by prometheus_client's own parser."""

from __future__ import annotations

import math
import threading
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher.errors import ConfigErrors
from launcher.protocol.metrics import MetricsWriter
from launcher.testing.tracker import TrackerContract
from launcher.trackers.base import TrackerFailed
from launcher.trackers.sidecar import Sender, of_tracker, open_run
from tests.ports import free_port

from .conftest import PlannedRun

Planned = Callable[..., PlannedRun]


class TestContract(TrackerContract):
    @pytest.fixture
    def words(self) -> tuple[str, ...]:
        return ("tracker=prometheus", f"tracker.port={free_port()}")


class Served:
    """A run whose page is served."""

    def __init__(self, run: PlannedRun) -> None:
        configured, plan = of_tracker(run.run, run.plan, "prometheus")
        self.url = plan.tracker.place
        self.sender = Sender(run.run_dir, open_run(run.run_dir, configured, plan), plan)

    def scrape(self) -> dict[str, float]:
        """Return value by name, with the phase where there is one."""
        # as Prometheus asks; in the answer, names must keep their colons
        asked = urllib.request.Request(
            self.url, headers={"Accept": "application/openmetrics-text;version=1.0.0,*/*;q=0.2"}
        )
        page = urllib.request.urlopen(asked).read().decode()
        found = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                assert sample.labels["run_name"] == "tiny"
                assert sample.name.startswith("launcher:")
                assert sample.labels["run_id"]
                phase = sample.labels.get("phase")
                found[sample.name.removeprefix("launcher:") + (f"/{phase}" if phase else "")] = sample.value
        return found

    def finish(self, exit_code: int) -> float:
        """End the run; return the exit code of its last scrape."""
        end = threading.Thread(target=self.sender.tracked.finish, args=(exit_code,))
        end.start()
        while (code := self.scrape().get("run_exit_code")) is None:
            pass
        end.join()
        return code


@pytest.fixture
def run(planned: Planned) -> PlannedRun:
    return planned("tracker=prometheus", f"tracker.port={free_port()}", "run.name=tiny", "job.steps=7")


@pytest.fixture
def served(run: PlannedRun) -> Iterator[Served]:
    found = Served(run)
    yield found
    found.sender.tracked.finish(0)  # at once: nothing was scraped


STEP = {"train/loss": 5.0, "train/lr": 1e-3, "train/skipped": 0.0, "time/forward_s": 0.5, "time/data_s": 0.25}


def test_it_serves_the_newest_values_and_counts(run: PlannedRun) -> None:
    served = Served(run)
    with MetricsWriter(run.run_dir.metrics) as writer:
        writer.record(0, **{"baseline/add-one bigram": 6.5})
        writer.record(1, **STEP)
        writer.record(2, **{**STEP, "train/loss": math.nan, "train/skipped": 1.0})
        writer.record(2, **{"eval/loss": 4.5, "time/evaluate_s": 2.0})
    served.sender.send(is_last=False)
    page = served.scrape()
    assert math.isnan(page.pop("train_loss"))
    assert page.pop("train_last_step_timestamp_seconds") > 1.7e9
    assert page == {
        "train_num_steps": 7,
        "train_step": 2,
        "train_lr": 1e-3,
        "train_skipped": 1,
        "eval_loss": 4.5,
        "baseline_add_one_bigram": 6.5,
        "train_steps_total": 2,
        "train_nonfinite_steps_total": 1,
        "train_skipped_steps_total": 1,
        "train_repeated_steps_total": 0,
        "train_phase_seconds_total/forward": 1.0,
        "train_phase_seconds_total/data": 0.5,
        "train_phase_seconds_total/evaluate": 2.0,
    }
    served.finish(0)


def test_steps_trained_again_are_counted_and_a_later_process_counts_no_line_twice(run: PlannedRun) -> None:
    first = Served(run)
    with MetricsWriter(run.run_dir.metrics) as writer:
        for step in (1, 2, 3, 4):
            writer.record(step, **STEP)
    first.sender.send(is_last=False)
    with MetricsWriter(run.run_dir.metrics, start_step=2) as writer:
        writer.record(3, **STEP)
        first.sender.send(is_last=False)
        found = first.scrape()
        assert (found["train_step"], found["train_repeated_steps_total"], found["train_steps_total"]) == (3, 2, 5)
        first.finish(75)
        later = Served(run)
        writer.record(4, **STEP)
        later.sender.send(is_last=False)
        found = later.scrape()
    assert (found["train_step"], found["train_repeated_steps_total"], found["train_steps_total"]) == (4, 0, 1)
    later.finish(0)


def test_a_run_that_is_scraped_ends_once_its_exit_code_was(run: PlannedRun) -> None:
    served = Served(run)
    assert "run_exit_code" not in served.scrape()
    assert served.finish(3) == 3
    with pytest.raises(OSError, match="refused"):
        served.scrape()


def test_a_taken_port_is_refused_before_the_start_and_given_up_later(
    run: PlannedRun, served: Served, planned: Planned
) -> None:
    port = served.url.rpartition(":")[2].partition("/")[0]
    with pytest.raises(
        ConfigErrors, match=rf"tracker\.port={port}: 127\.0\.0\.1:{port} is already in use; set tracker"
    ):
        planned("tracker=prometheus", f"tracker.port={port}")
    words = ("tracker.report_to=[wandb,prometheus]", f"tracker.prometheus.port={port}")
    with pytest.raises(ConfigErrors, match=r"already in use; set tracker\.prometheus\.port=\d+, which is free"):
        planned(*words)
    with pytest.raises(TrackerFailed, match="in use"):
        Served(run)


@pytest.mark.parametrize("port", [0, 65536])
def test_a_number_that_is_no_port_is_refused(port: int, planned: Planned) -> None:
    with pytest.raises(
        ConfigErrors, match=rf"tracker\.port={port} .*must lie between 1 and 65535; set tracker\.port=9464"
    ):
        planned("tracker=prometheus", f"tracker.port={port}")
