"""The copy of a run directory in an object store: what is in it, in which order, and what a new pod makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.kubernetes import run_store as module
from launcher.backends.kubernetes.run_store import RunStore, store_folder
from launcher.errors import EnvironmentProblem
from launcher.protocol.rundir import RunDir
from launcher.utils.object_store import ObjectFolder
from tests.helpers import wait_for

RUN = "tiny/20260101-120000-abcd"


class Place:
    """A run directory in a pod, and the folder that stands for an object store."""

    def __init__(self, folder: Path) -> None:
        self.url = f"file://{folder}/store"
        self.remote = folder / "store" / RUN
        self.local = folder / "pod" / RUN
        self.said: list[str] = []

    def store(self) -> RunStore:
        return RunStore(self.url, RunDir(self.local), say=self.said.append)

    def write(self, name: str, text: str = "x") -> None:
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def save(self, step: int, text: str = "x") -> None:
        for name in ("model/weights", "rank0", "manifest.json"):
            self.write(f"checkpoints/.step_{step:08}.tmp/{name}", text)
        folder = self.local / f"checkpoints/step_{step:08}"
        if folder.exists():
            shutil.rmtree(folder)
        folder.with_name(f".{folder.name}.tmp").rename(folder)  # whole from the moment it exists, as of a real run

    def there(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.remote)): path.read_text() for path in self.remote.rglob("*") if path.is_file()
        }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.01)
    made = Place(tmp_path)
    for name in ("run.yaml", "plan.json", "logs/node0.0.log"):
        made.write(name)
    return made


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files in the order in which they are copied."""
    found: list[str] = []
    put = ObjectFolder.put

    def note(self: ObjectFolder, folder: Path, names: Any) -> None:
        names = list(names)
        put(self, folder, names)
        found.extend(names)

    monkeypatch.setattr(ObjectFolder, "put", note)
    return found


def test_checkpoints_are_copied_when_they_are_whole_and_the_rest_at_the_end(place: Place, puts: list[str]) -> None:
    for name in (".lock", "channel/socket", "logs/.part"):
        place.write(name)
    (place.local / "link").symlink_to("/etc/passwd")
    with place.store() as store:
        assert place.there().keys() == {"run.yaml", "plan.json", "logs/node0.0.log"}, "the store can be written"
        place.write("checkpoints/.step_00000004.tmp/rank0")
        place.save(2)
        wait_for(lambda: "checkpoints/step_00000002/manifest.json" in place.there())
        place.write("result.json", "done")
        place.write("logs/node0.0.log", "longer")
    assert store.problem == ""
    there = place.there()
    assert (there["result.json"], there["logs/node0.0.log"]) == ("done", "longer")
    of_checkpoint = [name for name in puts if name.startswith("checkpoints/")]
    assert sorted(of_checkpoint[:-1]) == ["checkpoints/step_00000002/model/weights", "checkpoints/step_00000002/rank0"]
    assert of_checkpoint[-1] == "checkpoints/step_00000002/manifest.json", "without it nothing counts"
    assert there.keys() == {*of_checkpoint, "run.yaml", "plan.json", "logs/node0.0.log", "result.json"}
    assert place.said == []


def test_what_the_run_prunes_is_removed_and_what_it_saves_again_is_copied_again(place: Place) -> None:
    with place.store():
        place.save(2)
        place.save(4)
        wait_for(lambda: "checkpoints/step_00000004/manifest.json" in place.there())
        shutil.rmtree(place.local / "checkpoints/step_00000002")
        place.save(4, "after a rewind")
    there = {name: text for name, text in place.there().items() if name.startswith("checkpoints/")}
    assert there == {
        f"checkpoints/step_00000004/{name}": "after a rewind" for name in ("model/weights", "rank0", "manifest.json")
    }


def test_a_new_pod_gets_whole_checkpoints_and_copies_nothing_twice(place: Place, puts: list[str]) -> None:
    with place.store():
        place.save(2)
    (place.remote / "checkpoints/step_00000004").mkdir()
    (place.remote / "checkpoints/step_00000004/rank0").write_text("half of it")
    before = {name: text for name, text in place.there().items() if "step_00000004" not in name}
    shutil.rmtree(place.local)
    puts.clear()
    store = place.store()
    assert store.restore() == len(before)
    assert {
        str(path.relative_to(place.local)): path.read_text() for path in place.local.rglob("*") if path.is_file()
    } == before
    with store:
        place.write("metrics.jsonl")
    assert puts == ["metrics.jsonl"]
    assert place.there().keys() == {*before, "metrics.jsonl"}, "what nothing completes is removed"
    assert place.store().restore() == 0, "a folder with files is the run's own"


def test_checkpoints_that_this_folder_never_had_stay_in_the_store(place: Place) -> None:
    place.save(1)
    with place.store():
        pass
    shutil.rmtree(place.local / "checkpoints")  # as on a claim that was restored from elsewhere
    place.save(2)
    store = place.store()
    assert store.restore() == 0, "the folder is not empty"
    with store:
        pass
    steps = {name.split("/")[1] for name in place.there() if name.startswith("checkpoints/")}
    assert steps == {"step_00000001", "step_00000002"}


def test_a_folder_that_was_fetched_in_part_is_completed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.save(1)
    with place.store():
        pass
    shutil.rmtree(place.local)
    fetch = ObjectFolder.fetch

    def ends(self: ObjectFolder, folder: Path, *, wanted: Any) -> int:
        fetch(self, folder, wanted=lambda name: name == "run.yaml")
        raise EnvironmentProblem("the pod was killed")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectFolder, "fetch", ends)
        with pytest.raises(EnvironmentProblem):
            place.store().restore()
    assert place.store().restore() == 6
    assert (place.local / "checkpoints/step_00000001/manifest.json").is_file()
    assert not (place.local / ".restoring").exists()


def test_a_checkpoint_that_is_pruned_while_it_is_copied_is_no_failure(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = ObjectFolder.put

    def pruned(self: ObjectFolder, folder: Path, names: Any) -> None:
        names = list(names)
        if names[-1].startswith("checkpoints/step_00000002"):
            shutil.rmtree(folder / "checkpoints/step_00000002", ignore_errors=True)
        put(self, folder, names)

    monkeypatch.setattr(ObjectFolder, "put", pruned)
    with place.store() as store:
        place.save(2)
        place.save(4)
    assert (store.problem, place.said) == ("", [])
    assert {name.split("/")[1] for name in place.there() if name.startswith("checkpoints/")} == {"step_00000004"}


def test_a_store_that_cannot_be_written_is_known_before_the_run(place: Place) -> None:
    place.url = "file:///proc/store"
    with pytest.raises(EnvironmentProblem, match=r"^file:///proc/store/tiny/.* cannot be written .* backend\.secret$"):
        place.store().__enter__()
    with pytest.raises(EnvironmentProblem, match="nosuch"):
        RunStore("nosuch://bucket", RunDir(place.local), say=print)


def test_a_store_that_fails_later_is_said_once_and_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.store() as store:
        put = ObjectFolder.put

        def fails(*_: Any) -> None:
            raise EnvironmentProblem("no room")

        monkeypatch.setattr(ObjectFolder, "put", fails)
        place.save(2)
        wait_for(lambda: place.said)
        monkeypatch.setattr(ObjectFolder, "put", put)
        wait_for(lambda: "checkpoints/step_00000002/manifest.json" in place.there())
        monkeypatch.setattr(ObjectFolder, "put", fails)
        place.write("result.json")
    assert place.said == ["the run directory is not copied: no room"] * 2
    assert store.problem == "no room"


def test_each_run_has_a_folder_of_its_own() -> None:
    assert store_folder("s3://bucket/runs/", f"/runs/{RUN}") == f"s3://bucket/runs/{RUN}"
