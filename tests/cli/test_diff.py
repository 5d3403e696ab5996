import json

import pytest

from launcher.config.compose import compose
from launcher.config.snapshot import save_run
from launcher.errors import ConfigError, ConfigErrors
from tests.helpers import launch_verb

run = launch_verb("diff")


def differences(capsys, *words):
    assert run(words) == 0
    return capsys.readouterr().out


def rows(text):
    return [line.split() for line in text.splitlines()]


def test_only_what_differs(capsys):
    text = differences(capsys, "default", "default job.seed=7 optimizer.eps=1e-3")
    assert rows(text)[1:] == [["job.seed", "0", "7"], ["optimizer.eps", "1e-08", "0.001"]]


def test_options_that_one_side_does_not_have(capsys):
    found = rows(differences(capsys, "default", "default parallel=zero3"))
    assert ["parallel.bucket_mb", "25", "-"] in found
    assert ["parallel.stage", "-", "3"] in found


def test_the_options_of_a_group_stand_together(capsys):
    keys = [row[0].partition(".")[0] for row in rows(differences(capsys, "default", "zero3_gpt2xl"))[1:]]
    assert len([key for key, previous in zip(keys, ["", *keys], strict=False) if key != previous]) == len(set(keys)) > 3


def test_a_run_and_an_experiment(capsys, tmp_path):
    save_run(compose(["+exp=ddp_gpt2", "job.seed=3"]).run, tmp_path / "run.yaml")
    assert rows(differences(capsys, str(tmp_path), "ddp_gpt2"))[1:] == [["job.seed", "3", "0"]]


def test_no_difference(capsys):
    assert differences(capsys, "default", "default job.seed=0") == "no difference\n"
    assert json.loads(differences(capsys, "default", "default", "--json")) == {}


def test_as_json(capsys):
    text = differences(capsys, "default", "default job.seed=7", "--json")
    assert json.loads(text) == {"job.seed": ["0", "7"]}


def test_both_sides_are_refused_together():
    with pytest.raises(ConfigErrors) as caught:
        run(["defalt", "default job.stps=3"])
    assert [error.option for error in caught.value.errors] == ["defalt", "job.stps"]


def test_one_name_is_not_enough():
    with pytest.raises(ConfigError, match="lacks B; write launch diff A B"):
        run(["default"])


def test_help(capsys):
    assert "launch diff A B" in differences(capsys, "--help")


def test_a_quote_that_does_not_end():
    with pytest.raises(ConfigErrors, match="cannot be parsed: No closing quotation; quote each override"):
        run(["default", "default job.sample_prompt=it's"])
