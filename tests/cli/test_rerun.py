"""``launch rerun``: the same configuration, another directory."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.cli.rerun import _restarted
from launcher.config.compose import compose
from launcher.config.data.base import CHECKPOINT_TOKENIZER
from launcher.config.parallel.zero import Zero
from launcher.config.precision import Bf16Precision
from launcher.config.snapshot import load_run, save_run
from launcher.errors import ConfigError
from launcher.runs.config_source import load_saved_run
from tests.helpers import launch_verb

run = launch_verb("rerun")

RUN = "20260101-120000-abcd"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run as ``launch resume`` leaves it: with its own directory, set to continue."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "tiny" / RUN
    folder.mkdir(parents=True)
    words = [
        "model=gpt2",
        "job.seed=5",
        "run.name=tiny",
        f"run.dir={folder}",
        "checkpoint.resume=auto",
        "tracker=local",
    ]
    save_run(compose(words).run, folder / "run.yaml")
    return folder


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert run([*words, "dry_run=true", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_begins_anew_elsewhere(capsys, stored) -> None:
    plan = planned(capsys, RUN[:8], "job.steps=7")
    assert Path(plan["run_dir"]).parent == stored.parent
    assert Path(plan["run_dir"]) != stored
    assert plan["run_id"] != RUN
    assert plan["work"]["num_steps"] == 7
    assert "auto" not in plan["summary"]["checkpoint"], "there is nothing to continue in a new directory"
    assert "name=gpt2 " in plan["summary"]["model"]
    assert [path.name for path in stored.iterdir()] == ["run.yaml"], "a dry run writes nothing"


def test_the_plan_as_text(capsys, stored) -> None:
    assert run([str(stored), "dry_run=true"]) == 0
    assert capsys.readouterr().out.startswith("Plan tiny · ")


def test_a_directory_may_be_given(capsys, stored, tmp_path) -> None:
    assert planned(capsys, RUN, "run.dir=mine")["run_dir"] == str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope"], "is not a run directory"),
        ([RUN, "model=gpt2"], "would change the kind of run"),
        ([RUN, "parallel=zero9"], "did you mean zero"),
        ([RUN, "job.stps=4"], "did you mean steps"),
        ([RUN, "job.steps.x=4"], "steps is a single value; set job.steps"),
        ([RUN, "-m"], "is composed already"),
        ([RUN, "--json"], "applies to plans only"),
    ],
)
def test_mistakes(stored, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(words)


def test_strategy_and_precision_can_be_chosen_again(stored) -> None:
    changed = load_saved_run(stored, ["parallel.stage=1", "parallel=zero3", "precision=bf16"])
    assert changed.parallel == Zero(stage=1)
    assert changed.precision == Bf16Precision()


@pytest.mark.parametrize("text", ["a,b", "[a]", "${x}", "it's ${x}, [y]", "range(1,3)"])
def test_the_word_that_a_message_shows_works(stored, text: str, capsys) -> None:
    with pytest.raises(ConfigError) as caught:
        run([RUN, f"job.sample_prompt={text}", "dry_run=true"])
    assert "-m" not in str(caught.value)
    (word,) = shlex.split(str(caught.value).rpartition(": ")[2])
    assert run([RUN, word, "dry_run=true"]) == 0
    changed = load_saved_run(stored, [word])
    assert changed.job.sample_prompt == text


def test_several_numbers_are_one_message(stored) -> None:
    with pytest.raises(ConfigError, match="give one value: only launch sweep runs grids, as new runs"):
        run([RUN, "job.steps=1,2"])


@pytest.mark.parametrize(("words", "tokenizer"), [((), "bpe"), (("data.tokenizer=bytes",), "bytes")])
def test_a_tokenizer_of_a_checkpoint_is_trained_anew(stored, words: tuple[str, ...], tokenizer: str) -> None:
    """A new directory has no checkpoint; ``launch resume`` had set both options."""
    saved = load_run(stored / "run.yaml")
    save_run(replace(saved, data=replace(saved.data, tokenizer=CHECKPOINT_TOKENIZER)), stored / "run.yaml")
    assert _restarted(stored, words).data.tokenizer == tokenizer


def test_a_real_run_again(launch_forked, completed, tmp_path) -> None:
    completed = Path(shutil.copytree(completed, tmp_path / "completed"))
    before = set(completed.glob("runs/*/*"))
    (folder,) = before
    ended = launch_forked("rerun", folder.name, "job.steps=2", cwd=completed).expect(0)
    assert "step 2/2" in ended.stdout
    (again,) = set(completed.glob("runs/*/*")) - before
    one, other = (yaml.safe_load((path / "run.yaml").read_text()) for path in (folder, again))
    assert one.pop("job") | {"steps": 2} == other.pop("job")
    assert one == other
    assert load_run(again / "run.yaml").job.steps == 2


def test_help(capsys) -> None:
    assert run(["--help"]) == 0
    assert "launch rerun RUN" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="lacks RUN; write launch rerun RUN"):
        run([])
