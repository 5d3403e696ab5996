"""The folder of a deployment: only what was written there is changed or removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from launcher.deploy import folder as folder_module
from launcher.deploy.folder import LIST, Listing, changed_files, difference, listed, load_list, locked, update, write
from launcher.errors import ConfigError, ConfigErrors, EnvironmentProblem
from launcher.utils.processes import identify

FILES = {"run.yaml": "a: 1\n", "manifests/service.yaml": "kind: Service\n"}


def test_what_is_rendered_is_written_and_again_nothing_changes(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "k8s"
    assert set(write(folder, FILES).changed) == set(FILES)
    assert (folder / "manifests/service.yaml").read_text() == FILES["manifests/service.yaml"]
    assert listed(folder).keys() == FILES.keys()
    assert write(folder, FILES).changed == ()
    assert difference(folder, FILES) == ""


def test_the_difference_names_new_changed_and_removed_files(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    text = difference(tmp_path, {"run.yaml": "a: 2\n", "manifests/new.yaml": "kind: New\n"})
    assert "-a: 1\n+a: 2\n" in text
    assert "+kind: New\n" in text
    assert "-kind: Service\n" in text
    assert "+++ /dev/null" in text


def test_files_that_are_rendered_no_longer_are_removed_with_their_folder(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    written = write(tmp_path, {"run.yaml": "a: 1\n"})
    assert written.removed == ("manifests/service.yaml",)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIST, "run.yaml"]


def test_a_changed_file_that_is_rendered_no_longer_is_kept(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    (tmp_path / "manifests/service.yaml").write_text("mine\n")
    written = write(tmp_path, {"run.yaml": "a: 1\n"})
    assert (written.removed, written.kept) == ((), ("manifests/service.yaml",))
    assert (tmp_path / "manifests/service.yaml").read_text() == "mine\n"


@pytest.mark.parametrize("was_written", [True, False])
def test_a_file_of_the_user_is_never_overwritten(tmp_path: Path, was_written: bool) -> None:
    if was_written:
        write(tmp_path, FILES)
    (tmp_path / "run.yaml").write_text("mine\n")
    with pytest.raises(ConfigErrors, match="changed since" if was_written else "not written by launch deploy"):
        write(tmp_path, {**FILES, "run.yaml": "a: 3\n", "other.yaml": "x\n"})
    assert (tmp_path / "run.yaml").read_text() == "mine\n"
    assert not (tmp_path / "other.yaml").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = tmp_path / "k8s"
    folder.mkdir()
    (folder / "manifests").symlink_to(elsewhere)
    with pytest.raises(ConfigErrors, match="symbolic link"):
        write(folder, FILES)
    assert not any(elsewhere.iterdir())


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "k8s").write_text("text")
    with pytest.raises(ConfigErrors, match="is a file, not a folder"):
        write(tmp_path / "k8s", FILES)


@pytest.mark.parametrize("text", ["[]", "{", '{"version": 1, "files": {"../x": "a"}}', '{"version": 9, "files": {}}'])
def test_a_list_of_others_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / LIST).write_text(text)
    with pytest.raises(ConfigError, match=r"deploy\.out=.*cannot be used"):
        write(tmp_path, FILES)
    assert not (tmp_path / "run.yaml").exists()


def _cut_short(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the disk be full when a file of this name is written."""
    write_atomic = folder_module.write_atomic

    def full(path: Path, data: str | bytes) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomic(path, data)

    monkeypatch.setattr(folder_module, "write_atomic", full)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_write_that_was_cut_short_is_one_error_and_any_other_rendering_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    if not is_new:
        write(tmp_path, {**FILES, "manifests/old.yaml": "kind: Old\n"})
    changed = {"run.yaml": "a: 2\n", "manifests/service.yaml": "kind: Other\n", "manifests/more.yaml": "kind: More\n"}
    with monkeypatch.context() as patch:
        _cut_short(patch, "service.yaml")
        with pytest.raises(ConfigError, match=r"deploy\.out=.*service\.yaml cannot be written: No space left"):
            write(tmp_path, changed)
    assert load_list(tmp_path).writing
    assert changed_files(tmp_path, ["run.yaml"]) == []
    write(tmp_path, {"run.yaml": "a: 3\n", "manifests/service.yaml": "kind: Third\n"})
    assert not load_list(tmp_path).writing
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {LIST, "run.yaml", "service.yaml"}


def test_a_promotion_that_was_cut_short_leaves_no_file_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, FILES)
    new = {"run.yaml": "a: 2\n", "manifests/service.yaml": "kind: Other\n"}
    with monkeypatch.context() as patch:
        _cut_short(patch, "service.yaml")
        with pytest.raises(EnvironmentProblem, match=r"service\.yaml cannot be written: No space left"):
            update(tmp_path, new)
    assert changed_files(tmp_path, new) == []
    update(tmp_path, new)
    assert load_list(tmp_path) == Listing(files=listed(tmp_path), is_promoted=True)
    (tmp_path / "run.yaml").write_text("mine\n")
    assert changed_files(tmp_path, new) == ["run.yaml"]


def test_a_place_where_nothing_can_be_written_is_one_error_that_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^deploy\.out=/proc/x: /proc/x cannot be written: No such file"):
        write(Path("/proc/x"), FILES)
    with pytest.raises(ConfigError, match=r"^deploy\.out=/proc/x: /proc/x cannot be written"), locked(Path("/proc/x")):
        pass
    (tmp_path / "manifests").write_text("mine\n")
    with pytest.raises(ConfigErrors, match="manifests is a file, and a folder of that name is rendered"):
        write(tmp_path, FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["manifests"]


def test_one_cause_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "manifests").symlink_to(tmp_path)
    with pytest.raises(ConfigErrors) as caught:
        write(tmp_path, {**FILES, "manifests/other.yaml": "x\n"})
    assert len(caught.value.errors) == 1


def test_temporary_files_of_killed_writes_are_removed_and_no_others(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    dead = next(pid for pid in range(4_000_000, 1, -1) if identify(pid) is None)
    gone = [f".run.yaml.{dead}.0123abcd.tmp", f"manifests/.service.yaml.{dead}.0123abcd.tmp"]
    stay = [f".run.yaml.{os.getpid()}.0123abcd.tmp", f".mine.{dead}.0123abcd.tmp", ".run.yaml.x.0123abcd.tmp"]
    for name in (*gone, *stay):
        (tmp_path / name).write_text("half")
    write(tmp_path, FILES)
    assert {name for name in (*gone, *stay) if (tmp_path / name).exists()} == set(stay)


def test_a_folder_has_one_writer_and_the_second_one_gets_its_process(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("1")  # of a process that was killed
    with (
        locked(tmp_path),
        pytest.raises(ConfigError, match=rf"^DIR=.*another launch deploy \(process {os.getpid()}\)"),
        locked(tmp_path, option="DIR"),
    ):
        pass
    assert not any(tmp_path.iterdir())
