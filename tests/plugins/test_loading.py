"""Which plugins are loaded, what they add to the schema, and what is wrong with others."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

import launcher
from launcher.checkpoint.manifest import TrainingProgress, describe_checkpoint
from launcher.checkpoint.store import CheckpointStore
from launcher.config.checkpoint import Checkpoint
from launcher.config.compose import compose
from launcher.config.plugins import load_plugins
from launcher.config.registry import KINDS, component_class
from launcher.config.snapshot import load_run, save_run
from launcher.errors import ConfigError, Unfit, exit_code_of_rank
from launcher.runs.config_source import load_saved_run
from launcher.utils.schema import field_types, is_option_type
from tests.helpers import launch_verb
from tests.plugins.conftest import OPTIONS, PLUGIN, STEPS_YAML, WritePlugin, forget, install


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


@pytest.mark.parametrize("entry", ["mine", "mine:plugin"])
def test_an_entry_point_loads_a_plugin(entry: str, write_plugin: WritePlugin, tmp_path: Path) -> None:
    write_plugin(PLUGIN[:-1] + ', conf="conf")', schedule__steps=STEPS_YAML)
    install("mine", tmp_path, entry=entry)
    assert compose(["schedule=steps"]).run.plugins == ("mine",)


def test_a_rank_loads_the_plugins_of_its_run_alone(write_plugin: WritePlugin, tmp_path: Path) -> None:
    word = write_plugin(PLUGIN[:-1] + ', conf="conf")', schedule__steps=STEPS_YAML)
    found = save_run(compose([word, "schedule=steps"]).run, tmp_path / "run.yaml")
    forget()
    write_plugin("1 / 0", name="other")
    install("other", tmp_path)
    assert load_run(tmp_path / "run.yaml", expected_hash=found).schedule.kind == "steps"
    assert "ZeroDivisionError" in refused("job.steps=2")


def test_the_current_folder_is_searched_for_modules_in_it(example: str, write_plugin: WritePlugin) -> None:
    here = str(Path.cwd())
    compose([example])
    assert here not in sys.path
    compose([write_plugin()])
    assert sys.path[-1] == here


@pytest.mark.parametrize(
    ("plugin", "parts"),
    [
        ("1 / 0", ["ZeroDivisionError", "mine/__init__.py:3", "correct"]),
        ("None", ["mine/__init__.py has no launcher.plugins.Plugin"]),
        ('Plugin(name="mine", options={"layer": {}})', ["which plugins cannot add to"]),
        (
            'Plugin(name="mine", options={"schedule": {"cosine": "mine.options:Steps"}})',
            ["already has", "another name"],
        ),
        ('Plugin(name="mine", options={"schedule": {"steps": "mine.options:Stairs"}})', ["has no attribute 'Stairs'"]),
        (
            'Plugin(name="mine", options={"optimizer": {"x": "mine.options:Steps"}})',
            ["only one of options and"],
        ),
        ('Plugin(name="mine", conf="conf")', ["is not a folder"]),
        ('__import__("sys").exit(2)', ["SystemExit: 2", "mine/__init__.py:3"]),
        ('Plugin(name="mine", executors={"loss": {"x": print}})', ["executors has values that are not text"]),
        ('Plugin(name="mine", options={"schedule": "steps"})', ["options has values that are not text"]),
        (
            'Plugin(name="mine", executors={"loss": {"cross_entropy": "mine.options:Steps"}})',
            ["the loss cross_entropy, which the launcher already has"],
        ),
        ('Plugin(name="mine", executors={"loss": {"x": "no.such:f"}})', ["importing its package fails", "named 'no'"]),
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
        ("height: float = 0.5", "height: list[float] = ()", "Steps.height has the type list[float], which no option"),
        ("height: float = 0.5", "height: 'Unknown' = 0.5", "Steps has types that cannot be read"),
        ("frozen=True, ", "", "cannot inherit non-frozen"),
        ('] = "steps"', '] = "stairs"', "has the kind 'stairs'"),
        ("(Schedule)", "", "not a dataclass that derives from launcher.config.schedule.Schedule"),
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


def test_a_validation_that_yields_something_else_is_named(write_plugin: WritePlugin) -> None:
    options = OPTIONS.replace("    def decay(", '    def validate(self):\n        yield "too high"\n\n    def decay(')
    word = write_plugin(PLUGIN[:-1] + ', conf="conf")', options=options, schedule__steps=STEPS_YAML)
    with pytest.raises(ConfigError, match=r"Steps\.validate\(\) yields str instead of ConfigError; write yield self"):
        compose([word, "schedule=steps"])


def test_every_option_of_the_launcher_has_a_type_that_plugins_may_use() -> None:
    classes = [component_class(group, kind) for group, kinds in KINDS.items() for kind in kinds]
    assert all(is_option_type(wanted) for cls in classes for wanted in field_types(cls).values())


def test_names_in_branches_of_a_module_are_found(write_plugin: WritePlugin) -> None:
    branch = "try:\n    from math import hypot as focal\nexcept ImportError:\n    focal = None\n"
    word = write_plugin(
        'Plugin(name="mine", executors={"loss": {"focal": "mine.options:focal"}})', options=OPTIONS + branch
    )
    assert compose([word, "job.loss=focal"]).run.plugins == ("mine",)


def test_a_missing_module_is_named() -> None:
    assert "there is no module nowhere" in refused("plugins=[nowhere.at_all]")
    for value in ("[a-b]", "a,b", "[a"):
        assert "is not the name of a module" in refused(f"plugins={value}")
    Path("folder").mkdir()
    for value in ("folder", "sys"):
        assert "it has no launcher.plugins.Plugin" in refused(f"plugins={value}")


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
    error = refused(
        write_plugin(plugin, schedule__cosine=STEPS_YAML, schedule__fall="height: 1\n", schedul__x="height: 1\n")
    )
    assert "the launcher already has schedule/cosine" in error
    assert "schedule/fall.yaml: names no kind of the group schedule; begin it with kind: steps" in error
    assert "schedul/x.yaml: there is no group schedul; did you mean schedule?" in error


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
    expected = (
        f"{socket.gethostname()}: the plugin mine, which this run uses, cannot be loaded: there is no module mine"
    )
    with pytest.raises(Unfit, match=re.escape(expected)) as caught:
        load_run(tmp_path / "run.yaml", expected_hash=found)
    assert exit_code_of_rank(caught.value) == 69


def test_changes_of_a_saved_run_may_use_a_plugin(write_plugin: WritePlugin, tmp_path: Path) -> None:
    word = write_plugin('Plugin(name="mine", executors={"callback": {"count": "mine.options:Steps"}})')
    save_run(compose([]).run, tmp_path / "run.yaml")
    assert load_saved_run(tmp_path, [word, "job.callbacks=[count]"]).plugins == ("mine",)


def test_weights_of_a_plugins_model_need_the_plugin(example: str, tmp_path: Path) -> None:
    run = compose([example, "model=gated_conv"]).run
    folder = tmp_path / "runs" / "gated_conv" / "20260101-120000-abcd"
    (folder / "checkpoints").mkdir(parents=True)
    save_run(run, folder / "run.yaml")
    store = CheckpointStore(folder / "checkpoints", Checkpoint(keep=0))
    weights = store.begin(1) / "model"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"weights")
    about = describe_checkpoint(
        run,
        TrainingProgress(step=1, sequences=0),
        world_size=1,
        plan={"run_id": folder.name, "run_hash": "0" * 64},
    )
    store.commit(about)
    evaluated = launcher.compose([example, "job=evaluate", f"model.weights={folder}"])
    assert (evaluated.model.kind, evaluated.plugins) == ("gated_conv", ("launcher_example",))


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
    shown = capsys.readouterr().out
    assert "lion lr=0.0003" in shown
    assert "(4N weights + 4N gradients + 4N optimizer state) / " in shown
    with pytest.raises(ConfigError, match="set optimizer=adamw, parallel=ddp or parallel=fsdp"):
        plan([example, "+exp=example", "parallel=zero2"])
