import json

import pytest
import yaml

from launcher.config.compose import compose
from launcher.config.snapshot import save_run
from launcher.errors import ConfigError
from tests.helpers import launch_verb

run = launch_verb("show")


def shown(capsys, *words):
    assert run(words) == 0
    return capsys.readouterr().out


def test_an_experiment_is_shown_resolved(capsys):
    assert yaml.safe_load(shown(capsys, "zero3_gpt2xl")) == compose(["+exp=zero3_gpt2xl"]).tree


def test_with_overrides(capsys):
    tree = yaml.safe_load(shown(capsys, "default", "model=gpt2", "backend.env={A: b c}"))
    assert tree["run"]["name"] == "gpt2"
    assert tree["backend"]["env"] == {"A": "b c"}


@pytest.mark.parametrize("text", ["a b", "it's b", r"C:\x", 'a "b'])
def test_one_override_alone_is_one_word(capsys, text):
    assert yaml.safe_load(shown(capsys, f"job.sample_prompt={text}"))["job"]["sample_prompt"] == text


def test_a_run_with_values_changed(capsys, tmp_path):
    save_run(compose(["job.steps=7"]).run, tmp_path / "run.yaml")
    assert yaml.safe_load(shown(capsys, str(tmp_path), "job.steps=8"))["job"]["steps"] == 8


def test_an_option_of_a_group_is_written_out():
    with pytest.raises(ConfigError, match="is neither an experiment nor a run; write model=gpt2"):
        run(["gpt2"])


def test_as_json(capsys):
    assert json.loads(shown(capsys, "ddp_gpt2", "--json")) == compose(["+exp=ddp_gpt2"]).tree


def test_a_run_directory(capsys, tmp_path):
    composed = compose(["job.steps=7"])
    save_run(composed.run, tmp_path / "run.yaml")
    assert yaml.safe_load(shown(capsys, str(tmp_path))) == composed.tree


def test_a_misspelt_experiment_is_guessed():
    with pytest.raises(ConfigError, match="did you mean zero3_gpt2xl"):
        run(["zero3_gptxl"])


def test_help(capsys):
    assert "launch show EXP" in shown(capsys, "-h")
    with pytest.raises(ConfigError, match=r"lacks EXP\|RUN; write launch show EXP\|RUN"):
        run([])
