"""Several trackers at once: what ``tracker.report_to`` composes to, and what it refuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.config.compose import compose
from launcher.config.snapshot import load_run, save_run
from launcher.config.tracker import Mlflow, SeveralTrackers, TensorBoard, Wandb
from launcher.errors import ConfigErrors
from tests.plugins.conftest import example as example
from tests.plugins.conftest import forgotten as forgotten

REPORT_TO = "tracker.report_to=[wandb,mlflow,tensorboard]"


def test_each_tracker_has_its_own_options_also_from_a_snapshot(tmp_path: Path) -> None:
    run = compose([REPORT_TO, "tracker.wandb.project=p", "tracker.mlflow.tags={a: '1'}"]).run
    assert run.tracker.members == (Wandb(project="p"), Mlflow(tags={"a": "1"}), TensorBoard())
    save_run(run, tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run
    chosen = compose(["tracker=several"]).run.tracker
    assert isinstance(chosen, SeveralTrackers)
    assert chosen.report_to == ("wandb", "tensorboard")


def test_a_tracker_of_a_plugin_is_one_of_several(example: str) -> None:
    run = compose([example, "tracker.report_to=[tensorboard,csv]"]).run
    assert [each.kind for each in run.tracker.members] == ["tensorboard", "csv"]
    assert run.plugins == ("launcher_example",), "the process beside rank 0 imports it"
    with pytest.raises(ConfigErrors, match=r"tracker\.plugin_options\.csv\.pth .*no such option"):
        compose([example, "tracker.report_to=[csv]", "tracker.plugin_options={csv: {pth: a}}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tracker.report_to=[]"], r"tracker\.report_to=\[\].*names no tracker; set tracker=local"),
        (["tracker.report_to=[wandb,mlflw]"], r"tracker\.report_to=mlflw.*did you mean mlflow"),
        (["tracker.report_to=[wandb,wandb]"], r"names wandb twice"),
        (["tracker.report_to=[local]"], r"leave it out: metrics\.jsonl is always written"),
        (["tracker.report_to=[wandb]", "tracker.mlflow.experiment=x"], r"tracker\.mlflow.*has no effect.*add mlflow"),
        (["tracker.report_to=[wandb]", "tracker.plugin_options={csv: {}}"], r"tracker\.plugin_options\.csv.*no effect"),
        (
            ["tracker.report_to=[wandb]", "tracker.project=y"],
            r"tracker\.project.*mean tracker\.wandb\.project=y",
        ),
        (["tracker=mlflow", "tracker.report_to=[wandb]"], r"tracker\.report_to.*tracker=several has it"),
        (["data=synthetic", "job.sample_prompts=[a]"], r"job\.sample_prompts: data=synthetic has no tokenizer"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str, plan_of: Any) -> None:
    with pytest.raises(ConfigErrors, match=message):
        plan_of(*words)


def test_errors_of_all_trackers_name_the_options_below_them(plan_of: Any) -> None:
    with pytest.raises(ConfigErrors) as raised:
        plan_of(REPORT_TO, "tracker.wandb.mode=online", "tracker.mlflow.tracking_uri=mlruns")
    assert [error.option for error in raised.value.errors] == ["tracker.wandb.mode", "tracker.mlflow.tracking_uri"]
    assert "set tracker.wandb.mode=offline" in raised.value.errors[0].fix


def test_a_missing_package_is_refused_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = compose([REPORT_TO]).run
    assert [(error.option, error.value, error.fix) for error in run.tracker.validate_machine()] == [
        ("tracker.report_to", "mlflow", "pip install 'launcher[mlflow]'"),
        ("tracker.report_to", "tensorboard", "pip install 'launcher[tensorboard]'"),
    ]
    found = {"mlflow": sys}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    (error,) = Mlflow().validate_machine()
    assert "a database needs sqlalchemy and alembic" in error.why
    assert list(Mlflow(tracking_uri="http://host").validate_machine()) == []
