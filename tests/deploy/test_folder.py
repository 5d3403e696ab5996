"""The folder of a deployment: only what was written there is changed or removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.deploy.folder import LIST, difference, listed, write
from launcher.errors import ConfigError, ConfigErrors

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
