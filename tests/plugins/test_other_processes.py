"""How plugins reach other processes and hosts, and what is found wrong with them there before anything starts."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from launcher.backends.kubernetes import entrypoint as pod
from launcher.backends.kubernetes.pod_config import PodConfig, load_pod_config
from launcher.backends.registry import executor_of
from launcher.backends.slurm import entrypoint as batch_process
from launcher.config.compose import compose
from launcher.config.run import Run
from launcher.config.snapshot import save_run
from launcher.errors import ConfigError, Unfit
from launcher.execution.prepare import PreparedRun, prepare
from launcher.execution.probe import probe_and_replan
from launcher.plugins.loading import PLUGIN_PATH, LoadedPlugin, path_environment, plugins_of
from launcher.protocol.plan import RunIdentity
from launcher.remote.bundle import make_bundle
from launcher.utils.files import read_json
from launcher.utils.system import child_environment
from tests.helpers import launch_verb
from tests.plugins.conftest import PLUGIN, STEPS_YAML, WritePlugin, forget, install

STEPS = PLUGIN[:-1] + ', conf="conf")'
OTHER = 'Plugin(name="other", executors={"callback": {"count": "other.options:Steps"}})'
WORDS = ("schedule=steps", "model=gpt2_tiny", "data=synthetic", "tracker=local", "checkpoint.every=0")


@pytest.fixture
def word(write_plugin: WritePlugin) -> str:
    """Write a plugin with a schedule, and return the word that loads it."""
    return write_plugin(STEPS, schedule__steps=STEPS_YAML)


def test_modules_beside_a_plugin_replace_nothing_in_other_processes(word: str, tmp_path: Path) -> None:
    for name in ("random", "json", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the {name}.py beside the plugin')")
    run = compose([word, "schedule=steps"]).run
    environ = {**child_environment(), **path_environment(run.plugins)}
    assert environ[PLUGIN_PATH] == str(tmp_path)
    assert str(tmp_path) not in environ.get("PYTHONPATH", "").split(os.pathsep)
    save_run(run, tmp_path / "run.yaml")
    code = f"import json, random; from launcher.config.snapshot import load_run; from pathlib import Path; \
print(load_run(Path({str(tmp_path / 'run.yaml')!r}), is_own_run=True).schedule.kind)"
    ended = subprocess.run([sys.executable, "-c", code], env=environ, cwd="/", capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("steps\n", "")


@pytest.mark.parametrize("backend", ["local", "ssh", "deepspeed", "slurm"])
def test_other_hosts_get_the_plugins_that_the_run_uses(
    backend: str, write_plugin: WritePlugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unused").mkdir()
    write_plugin(OTHER, name="other")
    (tmp_path / "other").rename(tmp_path / "unused" / "other")
    monkeypatch.syspath_prepend(tmp_path / "unused")
    write_plugin(STEPS, schedule__steps=STEPS_YAML)
    (tmp_path / "hostfile").write_text("node1 slots=1\n")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    prepared = prepare(compose(["plugins=[mine,other]", *WORDS, f"backend={backend}"]))
    executor = executor_of(prepared.run)
    if backend == "slurm":
        text = executor.render(prepared.plan, snapshot="")
        assert f"\nexport {PLUGIN_PATH}={tmp_path}\n" in text
        assert "PYTHONPATH" not in text
    elif backend == "local":
        assert executor.remote_command(prepared.hosts[0], "module").env == {PLUGIN_PATH: str(tmp_path)}
    else:
        header = json.loads(executor.remote_command(prepared.hosts[0], "module").prologue.split(b"\n")[1])
        assert header["env"] == {PLUGIN_PATH: str(tmp_path)}
        assert str(tmp_path) not in header["pythonpath"]


def test_an_installed_plugin_needs_no_folder(
    write_plugin: WritePlugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugin(STEPS, schedule__steps=STEPS_YAML)
    install("mine", tmp_path)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "site"))
    (loaded,) = plugins_of(compose(["schedule=steps"]).run.plugins)
    assert loaded.version == "1.0"
    assert path_environment(["mine"]) == {}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working tree with one file."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "code.py").write_text("")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


def test_the_code_is_sent_with_the_plugins_that_the_run_uses(
    write_plugin: WritePlugin, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugin(OTHER, name="other")
    write_plugin(STEPS, schedule__steps=STEPS_YAML)
    (tmp_path / "hostfile").write_text("node1 slots=1\n")
    monkeypatch.setattr("launcher.backends.ssh.code_root", lambda: tree)
    prepared = prepare(compose(["plugins=[mine,other]", *WORDS, "backend=ssh", "backend.code=sent"]))
    sent = executor_of(prepared.run).remote_command(prepared.hosts[0], "module").prologue
    _, header, payload = sent.split(b"\n", 2)
    assert json.loads(header)["env"] == {}
    with tarfile.open(fileobj=io.BytesIO(payload)) as archive:
        names = ["code.py", "mine/__init__.py", "mine/conf/schedule/steps.yaml", "mine/options.py"]
        assert archive.getnames() == names


def test_a_plugin_with_the_name_of_sent_code_is_refused_in_the_plan(
    word: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostfile").write_text("node1 slots=1\n")
    (tree / "mine.py").write_text("")
    monkeypatch.setattr("launcher.backends.ssh.code_root", lambda: tree)
    with pytest.raises(ConfigError) as caught:
        launch_verb("plan")([word, *WORDS, "backend=ssh", "backend.code=sent"])
    assert str(caught.value).startswith(f"plugins=mine: {tmp_path}/mine would replace {tree}/mine.py, or be merged")
    assert f"rename {tmp_path}/mine" in str(caught.value)


def loaded_from(folder: Path, module: str, *files: str) -> LoadedPlugin:
    """Return a plugin whose module is a package with these files beside ``__init__.py``."""
    package = folder.joinpath(*module.split("."))
    package.mkdir(parents=True)
    for file in ("__init__.py", *files):
        (package / file).write_text(str(folder))
    plugin: object = None
    return LoadedPlugin(plugin=plugin, module=module, file=package / "__init__.py", is_installed=False)  # type: ignore[arg-type]


def test_plugins_in_one_namespace_are_sent_unless_they_share_a_file(tree: Path, tmp_path: Path) -> None:
    first, second = loaded_from(tmp_path / "a", "team.x", "help.py"), loaded_from(tmp_path / "b", "team.y")
    (tmp_path / "a" / "team" / "z").mkdir()  # another package of the namespace is not the plugin's
    (tmp_path / "a" / "team" / "z" / "secret.py").write_text("")
    with tarfile.open(fileobj=io.BytesIO(make_bundle(tree, [first, second]).payload)) as archive:
        assert archive.getnames() == ["code.py", "team/x/__init__.py", "team/x/help.py", "team/y/__init__.py"]
    third = loaded_from(tmp_path / "c", "team.x")
    with pytest.raises(ConfigError, match=r"c/team/x/__init__\.py would replace .*a/team/x/__init__\.py"):
        make_bundle(tree, [first, third])


def test_files_of_a_plugin_in_the_tree_that_git_ignores_are_sent_too(tree: Path) -> None:
    (tree / ".gitignore").write_text("help.py\n")
    inside = loaded_from(tree, "mine", "help.py")
    with tarfile.open(fileobj=io.BytesIO(make_bundle(tree, [inside]).payload)) as archive:
        assert sorted(archive.getnames()) == [".gitignore", "code.py", "mine/__init__.py", "mine/help.py"]


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an ``ssh`` that runs its command here; the file that is returned is executed before, as the host's own."""
    profile = tmp_path / "bin" / "profile"
    profile.parent.mkdir()
    profile.write_text("")
    program = profile.with_name("ssh")
    program.write_text(f'#!/bin/sh\ncd /\nunset PYTHONPATH\n. {profile}\nfor last; do :; done\nexec sh -c "$last"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{profile.parent}:{os.environ['PATH']}")
    (tmp_path / "hostfile").write_text("node1 slots=1\n")
    return profile


def probed(word: str, *words: str) -> PreparedRun:
    prepared = prepare(compose([word, *WORDS, "backend=ssh", *words]))
    return probe_and_replan(prepared, executor_of(prepared.run))


def test_the_probe_of_a_host_loads_the_plugins_of_the_run(word: str, ssh: Path, tmp_path: Path) -> None:
    for name in ("random", "json"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the {name}.py beside the plugin')")
    with (tmp_path / "mine" / "__init__.py").open("a") as file:
        file.write("print('hello', end='')\n")
    assert probed(word).hosts[0].is_probed


def test_a_host_that_lacks_a_plugin_is_refused(word: str, ssh: Path, tmp_path: Path) -> None:
    ssh.write_text(f"mv {tmp_path}/mine {tmp_path}/gone\n")
    with pytest.raises(Unfit) as caught:
        probed(word)
    by = f"cannot be loaded by {sys.executable}: there is no module mine in this environment or in the current folder"
    fix = "install its package there, with what it imports; backend=ssh sends the package with backend.code=sent"
    assert str(caught.value) == f"node1: the plugin mine, which the run uses, {by}\n  → {fix}"


def test_a_plugin_that_imports_only_here_is_refused(
    word: str, ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "only_here.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "libraries")
    with (tmp_path / "mine" / "options.py").open("a") as file:
        file.write("import only_here\n")
    with pytest.raises(Unfit) as caught:
        probed(word)
    assert str(caught.value).startswith("node1: the plugin mine, which the run uses, cannot be loaded by ")
    assert f"{tmp_path}/mine/__init__.py: schedule steps names mine.options:Steps" in str(caught.value)
    assert "No module named 'only_here'" in str(caught.value)


def test_another_version_of_a_plugin_on_a_host_is_refused(
    word: str, write_plugin: WritePlugin, ssh: Path, tmp_path: Path
) -> None:
    install("mine", tmp_path)
    (tmp_path / "site").rename(tmp_path / "there")
    sys.path.remove(str(tmp_path / "site"))
    with (tmp_path / "there" / "mine" / "options.py").open("a") as file:
        file.write("# older\n")
    write_plugin(STEPS, schedule__steps=STEPS_YAML)
    ssh.write_text(f"export PYTHONPATH={tmp_path}/there\n")
    with pytest.raises(Unfit) as caught:
        probed(word)
    (own,) = plugins_of(["mine"])
    what, _, fix = str(caught.value).partition("\n  → ")
    assert what.startswith("node1: its plugin mine is 1.0 ")
    assert f"({tmp_path}/there/mine/__init__.py)" in what
    assert what.endswith(f" and this machine's is {own.code_hash[:12]} ({tmp_path}/mine/__init__.py)")
    assert fix == "install the same version there; backend=ssh sends the package with backend.code=sent"
    assert probed(word, "backend.code=sent").hosts[0].is_probed  # what was sent comes first


def test_the_names_of_files_count_as_code(tmp_path: Path) -> None:
    one, same = loaded_from(tmp_path / "a", "mine"), loaded_from(tmp_path / "b", "mine")
    other = loaded_from(tmp_path / "c", "mine", "help.py")
    for each in (one, same, other):
        (each.package / "__init__.py").write_text("")
        (each.package / "table.bin").write_bytes(os.urandom(9))
    assert one.code_hash == same.code_hash != other.code_hash


@pytest.fixture
def missing(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a run in pods with a plugin that no other process has."""
    run = compose([word, *WORDS, "backend=kubernetes", "backend.image=team/launcher:3"]).run
    (tmp_path / "mine").rename(tmp_path / "gone")
    forget()
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return run


@pytest.mark.parametrize("index", ["0", "1"])
def test_a_pod_whose_image_lacks_a_plugin_ends_the_run(
    index: str, missing: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_hash = save_run(missing, tmp_path / "run.yaml")
    identity = RunIdentity(run_id="x", run_dir="/runs/x", run_hash=run_hash, port=29500)
    (tmp_path / "pod.json").write_text(PodConfig(job="x", identity=identity).dump())
    monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    monkeypatch.setattr(sys, "argv", ["entrypoint", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        pod.main()
    assert caught.value.code == 69
    why = "cannot be loaded: there is no module mine in this environment or in the current folder"
    fix = "build the image team/launcher:3 (backend.image) with its package"
    what = f"{socket.gethostname()}: the plugin mine, which this run uses, {why}; {fix}"
    assert capsys.readouterr().err == f"exit code 69: {what}\n"


def test_an_image_with_another_version_of_a_plugin_is_refused(
    write_plugin: WritePlugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugin(STEPS, schedule__steps=STEPS_YAML)
    install("mine", tmp_path)
    prepared = prepare(compose([*WORDS, "backend=kubernetes", "backend.image=team/launcher:3"]))
    sent = []
    monkeypatch.setattr("launcher.backends.kubernetes.submit.render_manifests", lambda what, **_: sent.append(what))
    executor_of(prepared.run).render(prepared.plan, snapshot="")
    (tmp_path / "pod.json").write_text(sent[0].config.dump())
    config = load_pod_config(tmp_path)
    assert config.plugins == {"mine": "1.0"}
    pod.check_plugin_versions(config.plugins, image="i")
    with pytest.raises(Unfit) as caught:
        pod.check_plugin_versions({"mine": "1.1"}, image="i")
    what = f"its plugin mine is 1.0 ({tmp_path}/site/mine/__init__.py), and the machine that submitted the run has 1.1"
    assert str(caught.value) == (f"{socket.gethostname()}: {what}; build the image i (backend.image) with that version")


def test_the_manifests_say_that_the_image_needs_the_plugin(word: str) -> None:
    prepared = prepare(compose([word, *WORDS, "backend=kubernetes", "backend.image=team/launcher:3"]))
    text = executor_of(prepared.run).render(prepared.plan, snapshot="")
    assert "# The image must hold the plugins of the run: mine (" in text


def test_a_batch_job_without_the_plugin_records_its_end(
    missing: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(missing, tmp_path / "run.yaml")
    (tmp_path / "plan.json").write_text('{"run_id": "x"}')
    monkeypatch.setattr(sys, "argv", ["entrypoint", str(tmp_path)])
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        batch_process.main()
    assert caught.value.code == 69
    assert f"{socket.gethostname()}: the plugin mine, which this run uses, cannot be loaded" in capsys.readouterr().err
    result = read_json(tmp_path / "result.json")
    assert (result["status"], result["exit_code"]) == ("failed", 69)
