"""Which plugins are loaded, what they add to the schema, and what is wrong with others."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from launcher.config.compose import compose
from launcher.config.plugins import load_plugins
from launcher.config.registry import KINDS
from launcher.config.snapshot import load_run, save_run
from launcher.doctor.host_facts import collect_software
from launcher.errors import ConfigError, EnvironmentProblem, exit_code_of_rank
from launcher.plugins import loading
from launcher.plugins.loading import import_folders
from launcher.remote.bundle import make_bundle
from launcher.utils.system import child_environment
from tests.helpers import launch_verb
from tests.plugins.conftest import OPTIONS, PLUGIN, WritePlugin

STEPS_YAML = "# Falls in steps.\nkind: steps\n"


def refused(word: str, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose([word, *words])
    return str(caught.value)


def test_options_of_a_plugin_are_checked_like_the_launchers(write_plugin: WritePlugin) -> None:
    word = write_plugin(PLUGIN[:-1] + ', conf="conf")', schedule__steps=STEPS_YAML)
    run = compose([word, "schedule=steps", "schedule.height=0.25"]).run
    assert (run.schedule.kind, run.schedule.factor(5, 10)) == ("steps", 0.25)
    assert run.plugins == ("mine",)
    assert "did you mean height?" in refused(word, "schedule=steps", "schedule.hight=1")
    assert "schedule.height=high (command line): is text" in refused(word, "schedule=steps", "schedule.height=high")


def test_a_run_that_uses_nothing_of_it_does_not_need_it(write_plugin: WritePlugin) -> None:
    composed = compose([write_plugin()])
    assert composed.run.plugins == ()
    assert "plugins" not in composed.tree


def test_an_entry_point_loads_a_plugin(
    write_plugin: WritePlugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugin(PLUGIN[:-1] + ', conf="conf")', schedule__steps=STEPS_YAML)
    site = tmp_path / "site"
    (tmp_path / "mine").rename(tmp_path / "moved")
    site.mkdir()
    (tmp_path / "moved").rename(site / "mine")
    metadata = site / "mine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[launcher.plugins]\nmine = mine\n")
    monkeypatch.syspath_prepend(site)
    assert compose(["schedule=steps"]).run.plugins == ("mine",)


@pytest.mark.parametrize(
    ("plugin", "parts"),
    [
        ("1 / 0", ["ZeroDivisionError", "mine/__init__.py:3", "correct"]),
        ("None", ["mine/__init__.py holds no launcher.plugins.Plugin"]),
        ('Plugin(name="mine", options={"layer": {}})', ["which plugins cannot add to"]),
        (
            'Plugin(name="mine", options={"schedule": {"cosine": "mine.options:Steps"}})',
            ["has already", "another name"],
        ),
        ('Plugin(name="mine", options={"schedule": {"steps": "mine.options:Stairs"}})', ["has no attribute 'Stairs'"]),
        (
            'Plugin(name="mine", options={"optimizer": {"x": "mine.options:Steps"}})',
            ["only one of options and"],
        ),
        ('Plugin(name="mine", conf="conf")', ["is no folder"]),
        ('Plugin(name="mine", executors={"loss": {"x": "mine.no:f"}})', ["loss x names mine.no:f", "there is no such"]),
        ('Plugin(name="mine", executors={"loss": {"x": "mine.options:f"}})', ["options.py has no f"]),
    ],
)
def test_what_a_plugin_says_wrongly_is_named_with_its_file(
    plugin: str, parts: list[str], write_plugin: WritePlugin, tmp_path: Path
) -> None:
    error = refused(write_plugin(plugin))
    assert error.startswith("plugins=mine: ")
    assert str(tmp_path / "mine" / "__init__.py") in error
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('    """Of one step."""\n', "", "Steps.height has no docstring under it"),
        ('    """Falls in steps."""\n', "", "Steps has no docstring"),
        ("height: float = 0.5", "height = 0.5", "Steps.height has no type"),
        ("height: float = 0.5", "height: 'Unknown' = 0.5", "Steps has types that cannot be read"),
        ("frozen=True, ", "", "cannot inherit non-frozen"),
        ('] = "steps"', '] = "stairs"', "has the kind 'stairs'"),
        ("(Schedule)", "", "no dataclass that derives from launcher.config.schedule.Schedule"),
    ],
)
def test_a_dataclass_needs_docs_types_and_its_base(
    old: str, new: str, part: str, write_plugin: WritePlugin, tmp_path: Path
) -> None:
    assert old in OPTIONS
    error = refused(write_plugin(options=OPTIONS.replace(old, new)))
    assert part in error
    assert str(tmp_path / "mine") in error
    assert "steps" not in KINDS["schedule"]


def test_a_missing_module_is_named() -> None:
    assert "there is no module nowhere" in refused("plugins=[nowhere.at_all]")
    assert "is not the name of a module" in refused("plugins=[a-b]")


def test_files_of_options_import_no_code(tmp_path: Path, write_plugin: WritePlugin) -> None:
    write_plugin()
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "sly.yaml").write_text("# @package _global_\n# Sly.\nplugins: [mine]\n")
    with pytest.raises(ConfigError, match=r"plugins=.*\(.*exp/sly.yaml:3\): belongs on the command line"):
        compose(["+exp=sly"], config_dir=tmp_path)
    assert "mine" not in sys.modules
    with pytest.raises(ConfigError, match="belongs on the command line"):
        compose(["plugins.x=1"])


def test_two_plugins_with_one_name_for_a_kind_are_refused(write_plugin: WritePlugin) -> None:
    write_plugin()
    write_plugin(PLUGIN.replace('"mine"', '"other"').replace("mine.", "other."), name="other")
    error = refused("plugins=[mine,other]")
    assert "adds the schedule steps, which the plugin mine" in error


def test_yaml_of_a_plugin_is_checked(write_plugin: WritePlugin) -> None:
    plugin = PLUGIN[:-1] + ', conf="conf")'
    error = refused(write_plugin(plugin, schedule__cosine=STEPS_YAML, schedule__fall="height: 1\n"))
    assert "the launcher has schedule/cosine already" in error
    assert "schedule/fall.yaml: names no kind of the group schedule; begin it with kind: steps" in error


def test_a_saved_run_imports_nothing_that_the_user_did_not_name(
    write_plugin: WritePlugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = write_plugin(PLUGIN[:-1] + ', conf="conf")', schedule__steps=STEPS_YAML)
    found = save_run(compose([word, "schedule=steps"]).run, tmp_path / "run.yaml")
    forget()
    with pytest.raises(ConfigError, match=r"add plugins=\[mine\] to the command"):
        load_run(tmp_path / "run.yaml")
    assert "mine" not in sys.modules
    load_plugins(["mine"])
    assert load_run(tmp_path / "run.yaml").plugins == ("mine",)
    forget()
    assert load_run(tmp_path / "run.yaml", expected_hash=found).schedule.kind == "steps"  # as a rank does


def test_a_rank_without_the_plugin_exits_69(
    write_plugin: WritePlugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = write_plugin(PLUGIN[:-1] + ', conf="conf")', schedule__steps=STEPS_YAML)
    found = save_run(compose([word, "schedule=steps"]).run, tmp_path / "run.yaml")
    forget()
    (tmp_path / "mine").rename(tmp_path / "gone")
    with pytest.raises(EnvironmentProblem, match="the plugin mine, which this run uses, cannot be imported") as caught:
        load_run(tmp_path / "run.yaml", expected_hash=found)
    assert exit_code_of_rank(caught.value) == 69


def forget() -> None:
    """Be as a process that has loaded nothing."""
    loading._loaded.clear()
    KINDS["schedule"].pop("steps", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def test_other_processes_and_hosts_get_its_package(write_plugin: WritePlugin, tmp_path: Path) -> None:
    compose([write_plugin()])
    assert import_folders() == (str(tmp_path),)
    assert child_environment(import_folders())["PYTHONPATH"].split(os.pathsep)[-1] == str(tmp_path)
    assert collect_software(("mine", "mine.options", "nowhere.at_all")).missing_plugins == ("nowhere.at_all",)


def test_its_package_is_in_the_bundle(write_plugin: WritePlugin, tmp_path: Path) -> None:
    write_plugin()
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "code.py").write_text("")
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    bundle = make_bundle(tree, (tmp_path / "mine",))
    with tarfile.open(fileobj=io.BytesIO(bundle.payload)) as archive:
        assert archive.getnames() == ["code.py", "mine/__init__.py", "mine/options.py"]


def test_list_shows_what_it_adds_and_where_from(write_plugin: WritePlugin, capsys: pytest.CaptureFixture[str]) -> None:
    word = write_plugin(PLUGIN[:-1] + ', conf="conf")', schedule__steps=STEPS_YAML)
    listing = launch_verb("list")
    assert listing([word]) == 0
    shown = capsys.readouterr().out
    assert "plugin mine, plugins=[mine]" in " ".join(shown.split())
    assert "schedule=steps" in shown
    assert listing(["schedule", word]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "steps Falls in steps. (plugin mine, plugins=[mine])" in shown
    assert "schedule.height 0.5 a number Of one step." in shown


def test_experiments_of_a_plugin_name_the_line_of_a_wrong_value(write_plugin: WritePlugin) -> None:
    text = "# @package _global_\n# Mine.\nschedule:\n  warmup_steps: -1\n"
    word = write_plugin(PLUGIN[:-1] + ', conf="conf")', exp__mine=text)
    assert "conf/exp/mine.yaml:4" in refused(word, "+exp=mine")


def test_callbacks_and_losses_are_names_of_loaded_plugins(write_plugin: WritePlugin) -> None:
    executors = '{"callback": {"count": "mine.options:Steps"}, "loss": {"focal": "mine.options:Steps"}}'
    word = write_plugin(f'Plugin(name="mine", executors={executors})')
    assert "name the module that has it: plugins=[MODULE]" in refused("job.callbacks=[count]")
    assert compose([word, "job.callbacks=[count]", "job.loss=focal"]).run.plugins == ("mine",)
    error = refused(word, "job.callbacks=[counts]", "job.loss=vocal")
    assert "did you mean count?" in error
    assert "did you mean focal?" in error


def test_an_optimizer_of_a_plugin_needs_a_strategy_that_builds_it(
    example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = launch_verb("plan")
    assert plan([example, "+exp=example", "parallel=fsdp"]) == 0
    assert "lion lr=0.0003" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="set parallel=ddp or parallel=fsdp"):
        plan([example, "+exp=example", "parallel=zero2"])
