"""Files of ``deploy=monitoring``, compared whole: ``UPDATE_GOLDEN=1 pytest`` rewrites them; and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launcher.errors import ConfigErrors
from tests.conftest import REPOSITORY, Launch
from tests.deploy.monitoring.rendered import DEPLOY, SERVER, TRAINING_RUN, VLLM_SERVER, rendered, written

GOLDEN = REPOSITORY / "tests/golden/deploy/monitoring"


@pytest.mark.parametrize("words", [SERVER, TRAINING_RUN], ids=["serving", "training"])
def test_files_are_the_golden_ones(words: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    _, files = rendered(*words)
    folder = GOLDEN / request.node.callspec.id
    if os.environ.get("UPDATE_GOLDEN"):
        written(files, folder)
    kept = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.*")}
    assert files == kept


def test_the_verb_writes_what_is_rendered(launch_in_process: Launch, tmp_path: Path) -> None:
    for name, words in {"serving": ("job=serve", "tracker=local"), "training": ("tracker=prometheus",)}.items():
        launch_in_process("deploy", *words, "deploy=monitoring", f"deploy.out=monitoring/{name}").expect(0)
        assert (tmp_path / f"monitoring/{name}/rules/{name}.yml").is_file()


@pytest.mark.parametrize("words", [SERVER, TRAINING_RUN], ids=["serving", "training"])
def test_panels_have_places_of_their_own(words: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    _, files = rendered(*words)
    board = json.loads(files[f"grafana/dashboards/{request.node.callspec.id}.json"])
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(places)) == len(set(titles)) == len(board["panels"]) > 10
    assert all(x + width <= 24 for x, _, width, _ in places)


def test_metrics_that_vllm_lacks_are_not_asked_of_it() -> None:
    _, files = rendered(*VLLM_SERVER)
    assert "launcher:" not in "".join(files.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*SERVER, "deploy.slo_ttft_s=3"), r"deploy\.slo_ttft_s=3.*no upper bound .*set deploy\.slo_ttft_s=2\.5"),
        ((*SERVER, "deploy.slo_ttft_share=0.9"), r"deploy\.slo_ttft_share=0\.9.*1\.44 of all requests.*never fires"),
        ((*SERVER, "deploy.slo_success_share=1"), r"deploy\.slo_success_share=1.*between 0 and 1"),
        ((*SERVER, "deploy.targets=[http://a:1]"), r"deploy\.targets=http://a:1.*write it like deploy\.targets=\["),
        ((*SERVER, "deploy.alertmanagers=[a]"), r"deploy\.alertmanagers=a.*no address with a port"),
        ((*SERVER, "deploy.targets=[a:1,b:1,a:1]"), r"deploy\.targets=a:1.*is there twice"),
        ((*SERVER, "deploy.scrape_every_s=0"), r"deploy\.scrape_every_s=0.*at least 1"),
        ((*SERVER, "deploy.goodput_share=1.5"), r"deploy\.goodput_share=1\.5.*between 0 and 1"),
        (("tracker=local", *DEPLOY), r"tracker=local.*exports no metrics; set tracker=prometheus"),
        (("job=generate", "job.input=x.jsonl", "tracker=local", *DEPLOY), r"job=generate.*exports no metrics"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigErrors, match=message):
        rendered(*words)


def test_the_address_of_a_tracker_among_several_is_scraped() -> None:
    words = ("tracker.report_to=[wandb,prometheus]", "tracker.prometheus.host=0.0.0.0", "tracker.prometheus.port=9999")
    _, files = rendered(*words, *DEPLOY)
    assert "- localhost:9999\n" in files["prometheus.yml"]
