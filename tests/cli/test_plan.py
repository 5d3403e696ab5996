import json
import subprocess
import sys

import pytest

from launcher.errors import ConfigErrors
from launcher.protocol.plan import plan_from_json
from tests.helpers import launch_verb

run = launch_verb("plan")

HEAVY = ("torch", "deepspeed", "transformers", "wandb", "datasets", "numpy", "rich", "matplotlib", "psutil")


def test_text_and_json_tell_of_the_same_run(capsys):
    assert run(["job.steps=7", "job.sequence_length=64"]) == 0
    assert "× 7 steps" in capsys.readouterr().out
    assert run(["job.steps=7", "--json"]) == 0
    assert plan_from_json(json.loads(capsys.readouterr().out)).work.num_steps == 7


def test_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run([]) == 0
    assert capsys.readouterr().out.startswith("Plan gpt2_tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_lists_its_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["-m", "job.seed=1,2"]) == 0
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()] == ["job.seed=1", "job.seed=2"]


def test_mistakes_of_several_groups_are_reported_together():
    with pytest.raises(ConfigErrors) as caught:
        run(["job.sequence_length=999", "backend.env.SOME_KEY=1", "job.global_batch=3"])
    assert len(caught.value.errors) == 3


def test_help(capsys):
    assert run(["--help"]) == 0
    assert "launch plan" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["+exp=zero3_gpt2xl", "dry_run=true"], ["list", "parallel"], ["--help"]])
def test_the_parent_imports_nothing_heavy(words):
    script = (
        "import sys; from launcher.__main__ import main; code = main(sys.argv[1:]);"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
