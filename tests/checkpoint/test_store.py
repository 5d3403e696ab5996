"""The store: what is there is complete, whatever happened; what the policy keeps is there."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xxhash

from launcher.checkpoint.locks import ReadLock, RemovalLock
from launcher.checkpoint.manifest import UnsupportedManifest, WrittenFile, damaged_files, files_of_part, read_manifest
from launcher.checkpoint.store import CheckpointStore, best_first
from launcher.checkpoint.tensors import StoredState, shard_file_name, write_shards
from launcher.config.checkpoint import Checkpoint
from launcher.utils.files import read_json, write_json

from .conftest import Save, manifest_of

WRITERS = """
import os, sys
from pathlib import Path
from launcher.checkpoint.manifest import CheckpointManifest as Manifest
from launcher.config.checkpoint import Checkpoint
from launcher.checkpoint.store import CheckpointStore

def write_for_ever():
    store = CheckpointStore(Path(sys.argv[1]), Checkpoint(keep=2))
    store.clean()
    latest = store.latest()
    step = latest.manifest.step if latest else 0
    while True:
        step += 1
        pending = store.begin(step)
        for rank in range(3):
            with (pending / f"{rank}.bin").open("wb", buffering=0) as file:
                for _ in range(4):
                    file.write(step.to_bytes(8, "big") * 500)
        about = dict(run_id="a", run_hash="b", architecture={}, engine="torch", parallel={}, precision="fp32")
        store.commit(Manifest(step=step, created=0.0, world_size=3, eval_loss=1 / (1 + step % 7), **about))

for _ in sys.stdin:
    writer = os.fork()
    if writer == 0:
        write_for_ever()
    print(writer, flush=True)
    print(os.WTERMSIG(os.waitpid(writer, 0)[1]), flush=True)
"""
"""Forks a writer for each line of input: thirty interpreters would take a minute to start."""


def xxh3(content: bytes) -> str:
    return xxhash.xxh3_128(content).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_checkpoint_is_its_payload_and_a_manifest_that_lists_it(save: Save) -> None:
    saved = save(10, eval_loss=3.25)
    assert saved.folder.name == "step_00000010"
    assert names(saved.folder) == ["manifest.json", "model.bin", "ranks"]
    assert read_manifest(saved.folder) == saved.manifest
    assert saved.manifest.files == {"model.bin": 10, "ranks/0.bin": 10}
    assert saved.manifest.xxh3 == {"model.bin": xxh3(bytes(10)), "ranks/0.bin": xxh3(b"0" * 10)}
    assert (saved.manifest.step, saved.manifest.eval_loss, saved.manifest.world_size) == (10, 3.25, 2)
    assert saved.manifest.architecture["num_hidden_layers"] == 2
    assert saved.manifest.parallel["stage"] == 3


def test_a_loss_that_is_no_number_is_no_reason_to_lose_a_checkpoint(tmp_path: Path, save: Save) -> None:
    save(10, eval_loss=float("nan"))
    latest = CheckpointStore(tmp_path / "checkpoints", Checkpoint()).latest()
    assert latest is not None
    assert latest.manifest.eval_loss is None


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep": 2, "keep_best": True}, [20, 40, 50]),
        ({"keep": 2, "keep_best": False}, [40, 50]),
        ({"keep": 1, "keep_best": True}, [20, 50]),
        ({"keep": 4, "keep_best": True}, [20, 30, 40, 50]),
        ({"keep": 0, "keep_best": False}, [10, 20, 30, 40, 50]),
        ({"keep": 1, "keep_best": False, "keep_every": 20}, [20, 40, 50]),
        ({"keep": 1, "best_metric": "max:accuracy"}, [30, 50]),
        ({"keep": 1, "best_metric": "min:accuracy"}, [10, 50]),
    ],
)
def test_the_newest_the_best_and_every_nth_are_kept(
    tmp_path: Path, save: Save, policy: dict[str, int | bool | str], kept: list[int]
) -> None:
    for step, loss, accuracy in (
        (10, 4.0, 0.1),
        (20, 2.0, 0.3),
        (30, 3.0, 0.7),
        (40, None, None),
        (50, 2.5, 0.5),
    ):
        save(step, eval_loss=loss, accuracy=accuracy, **policy)
    assert names(tmp_path / "checkpoints") == [f"step_{step:08d}" for step in kept]


def test_the_best_is_that_of_the_newest_ones_metric(save: Save) -> None:
    saved = [save(step, accuracy=value, keep=0, best_metric="max:accuracy") for step, value in ((1, 0.5), (2, 0.9))]
    saved.append(save(3, keep=0, best_metric="max:accuracy"))
    assert [entry.manifest.step for entry in best_first(reversed(saved))] == [2, 1]
    assert best_first([]) == []


def test_a_checkpoint_that_is_read_stays_until_the_next_time(tmp_path: Path, save: Save) -> None:
    said: list[str] = []
    store = CheckpointStore(tmp_path / "checkpoints", Checkpoint(keep=1), say=said.append)
    read = save(10, keep=0)
    model = read.folder / "ranks"
    with ReadLock(model), ReadLock(read.folder):  # also by its folder of weights; readers share it
        save(20, keep=0)
        store.prune()
        assert names(tmp_path / "checkpoints") == ["step_00000010", "step_00000020"]
        assert said == [f"checkpoint {read.folder} is kept for now: another process is reading it"]
    store.prune()
    assert names(tmp_path / "checkpoints") == ["step_00000020"]


def test_open_tensors_keep_their_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", Checkpoint(keep=1))
    for step in (10, 20):
        file = store.begin(step) / shard_file_name(0)
        file.parent.mkdir()
        write_shards(file, [])
        saved = store.commit(manifest_of(step))
        if step == 10:
            state = StoredState([saved.folder / shard_file_name(0)])
    assert names(tmp_path / "checkpoints") == ["step_00000010", "step_00000020"]
    del state
    store.prune()
    assert names(tmp_path / "checkpoints") == ["step_00000020"]


def test_one_that_is_replaced_while_it_is_read_goes_away_later(tmp_path: Path, save: Save) -> None:
    with ReadLock(save(10).folder):
        save(10)
        assert names(tmp_path / "checkpoints") == [".step_00000010.old", "step_00000010"]
    save(20)
    assert names(tmp_path / "checkpoints") == ["step_00000010", "step_00000020"]


def test_a_checkpoint_that_was_removed_cannot_be_locked(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(10).folder

    def removed(*_: object) -> None:
        folder.rename(tmp_path / "elsewhere")

    monkeypatch.setattr("fcntl.flock", removed)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        ReadLock(folder)


def test_a_file_system_without_locks_is_named_once(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        save(step, keep=0)

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    said: list[str] = []
    with ReadLock(tmp_path / "checkpoints" / "step_00000030", say=said.append):
        CheckpointStore(tmp_path / "checkpoints", Checkpoint(keep=1), say=said.append).prune()
    assert names(tmp_path / "checkpoints") == ["step_00000030"]
    assert [line.partition(":")[0].partition("(")[0] for line in said] == [
        f"checkpoint {tmp_path}/checkpoints/step_00000030 cannot be locked ",
        f"checkpoints in {tmp_path}/checkpoints are removed without asking",
    ]


def test_files_that_ranks_have_hashed_are_not_read_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", Checkpoint())
    pending = store.begin(3)
    for number in range(3):
        (pending / f"{number}.bin").write_bytes(b"x" * number)
    written = {
        "1.bin": WrittenFile(num_bytes=1, checksum="1" * 32),
        "2.bin": WrittenFile(num_bytes=2, checksum="2" * 32),
    }
    saved = store.commit(manifest_of(3), written)
    assert saved.manifest.xxh3 == {"0.bin": xxh3(b""), "1.bin": "1" * 32, "2.bin": "2" * 32}


@pytest.mark.parametrize("found", [None, b"", b"xx"])
def test_a_file_that_is_not_as_it_was_written_is_no_checkpoint(tmp_path: Path, found: bytes | None) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", Checkpoint())
    pending = store.begin(3)
    if found is not None:
        (pending / "0.bin").write_bytes(found)
    with pytest.raises(OSError, match="cannot be read back"):
        store.commit(manifest_of(3), {"0.bin": WrittenFile(num_bytes=1, checksum="1" * 32)})
    assert store.latest() is None


def test_every_file_is_in_one_share_and_shares_are_alike() -> None:
    sizes = {f"{number}": 100 - number for number in range(40)} | {"large": 1000}
    shares = [files_of_part(sizes, part=part, parts=4) for part in range(4)]
    assert sorted(itertools.chain(*shares)) == sorted(sizes)
    assert max(sum(sizes[name] for name in share) for share in shares) <= 1.1 * sum(sizes.values()) / 4


def test_a_changed_bit_and_an_unreadable_file_are_named(save: Save) -> None:
    saved = save(10)
    assert damaged_files(saved.folder, saved.manifest, saved.manifest.files) == []
    (saved.folder / "model.bin").write_bytes(bytes(9) + b"\1")
    (saved.folder / "ranks" / "0.bin").unlink()
    assert damaged_files(saved.folder, saved.manifest, saved.manifest.files) == ["model.bin", "ranks/0.bin"]


@pytest.mark.parametrize(("version", "age"), [(2, "an older"), (4, "a newer")])
def test_a_manifest_of_another_version_says_so(save: Save, version: int, age: str) -> None:
    folder = save(10).folder
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "version": version})
    said = rf"step_00000010/manifest\.json has version {version}, this launcher reads 3: {age} launcher wrote it"
    with pytest.raises(UnsupportedManifest, match=said):
        read_manifest(folder)


_CURSOR = {"seed": 0, "global_batch": 4, "sequence_length": 32, "sequences": 40, "skipped": 0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": "ten"}, "manifest.json.step=ten"),
        ({"step": -10}, "step=-10"),
        ({"step": 11}, "step=11 in a folder called step_00000010"),
        ({"world_size": 0}, "world_size=0"),
        ({"files": ["model.bin"]}, "manifest.json.files"),
        ({"files": {"/etc/passwd": 1}}, "'/etc/passwd' is not a path below"),
        ({"files": {"../../private": 1}}, "'../../private' is not a path below"),
        ({"files": {"ranks/../../up": 1}}, "is not a path below"),
        ({"files": {"a\0b": 1}}, "is not a path below"),
        ({"files": {"": 1}}, "is not a path below"),
        ({"files": {"model.bin": -1}}, "-1 bytes"),
        ({"xxh3": {"model.bin": "0" * 32}}, "do not list the same files"),
        ({"xxh3": {"model.bin": "abc", "ranks/0.bin": "0" * 32}}, "'abc' of model.bin is not a checksum"),
        ({"eval_loss": float("nan")}, "manifest.json.eval_loss"),
        ({"parallel": None}, "manifest.json.parallel"),
        ({"architecture": []}, "manifest.json.architecture"),
        ({"run_id": {}}, "manifest.json.run_id"),
        ({"more": 1}, "manifest.json.more"),
        ({"version": None}, "version=null"),
        ({"version": True}, "version=true"),
        ({"stale_evaluations": -1}, "stale_evaluations=-1"),
        ({"data": {**_CURSOR, "sequences": -5}}, "sequences=-5"),
        ({"data": {**_CURSOR, "skipped": 41}}, "skipped=41"),
        ({"data": {**_CURSOR, "global_batch": 0}}, "global_batch=0"),
        ({"data": {**_CURSOR, "sequence_length": 0}}, "sequence_length=0"),
        ({"data": {**_CURSOR, "seed": "a"}}, "manifest.json.data.seed=a"),
    ],
)
def test_a_damaged_manifest_is_an_error_that_says_what(save: Save, change: dict[str, object], said: str) -> None:
    folder = save(10).folder
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), **change})
    with pytest.raises(ValueError, match=r"manifest\.json is damaged") as damaged:
        read_manifest(folder)
    assert said in str(damaged.value)


def test_a_manifest_without_a_version_is_damaged(save: Save) -> None:
    folder = save(10).folder
    tree = read_json(folder / "manifest.json")
    del tree["version"]
    write_json(folder / "manifest.json", tree)
    with pytest.raises(ValueError, match=r"damaged \(version=null\)"):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b'{"step": 1' + b"0" * 9999])
def test_what_is_no_manifest_is_an_error_of_ours(save: Save, content: bytes) -> None:
    folder = save(10).folder
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"its manifest\.json"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["manifest.json", "model.bin"])
def test_a_pipe_in_the_place_of_a_file_is_not_opened(tmp_path: Path, save: Save, name: str) -> None:
    file = save(10).folder / name
    file.unlink()
    os.mkfifo(file)
    said: list[str] = []
    assert CheckpointStore(tmp_path / "checkpoints", Checkpoint(), say=said.append).latest() is None
    assert "regular file" in said[0]


def test_the_checkpoint_just_written_stays_where_others_claim_a_later_step(tmp_path: Path, save: Save) -> None:
    save(50, keep=1)
    save(10, keep=1)
    assert names(tmp_path / "checkpoints") == ["step_00000010", "step_00000050"]


def test_a_damaged_one_is_set_aside_and_counts_as_none(tmp_path: Path, save: Save) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", Checkpoint())
    assert store.quarantine(save(10)).name == "step_00000010.damaged"
    assert store.quarantine(save(10)).name == "step_00000010.damaged1"
    assert store.latest() is None


@pytest.mark.parametrize("damage", ["missing", "short", "no manifest", "half a manifest", "another version"])
def test_an_incomplete_one_is_skipped_and_named(tmp_path: Path, save: Save, damage: str) -> None:
    save(10)
    folder = save(20).folder
    manifest = folder / "manifest.json"
    if damage == "missing":
        (folder / "ranks" / "0.bin").unlink()
    elif damage == "short":
        os.truncate(folder / "model.bin", 5)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        os.truncate(manifest, 40)
    else:
        write_json(manifest, {**read_json(manifest), "version": 4})
    said: list[str] = []
    latest = CheckpointStore(tmp_path / "checkpoints", Checkpoint(), say=said.append).latest()
    assert latest is not None
    assert latest.manifest.step == 10
    assert len(said) == 1
    assert str(folder) in said[0]


def test_incomplete_ones_are_neither_counted_nor_deleted(tmp_path: Path, save: Save) -> None:
    broken = save(10, keep=2).folder
    (broken / "model.bin").unlink()
    for step in (20, 30, 40):
        save(step, keep=2)
    assert names(tmp_path / "checkpoints") == ["step_00000010", "step_00000030", "step_00000040"]


def test_the_same_step_again_replaces_it(tmp_path: Path, save: Save) -> None:
    save(10, eval_loss=2.0)
    again = save(10, eval_loss=1.0)
    assert names(tmp_path / "checkpoints") == ["step_00000010"]
    assert read_manifest(again.folder).eval_loss == 1.0


@pytest.mark.parametrize("hidden", [".step_00000020.tmp", ".step_00000005.gone", ".step_00000010.old"])
def test_what_a_crash_left_is_removed(tmp_path: Path, save: Save, hidden: str) -> None:
    save(10)
    folder = tmp_path / "checkpoints"
    (folder / hidden).mkdir()
    (folder / hidden / "model.bin").write_bytes(b"half")
    (folder / ".other.tmp").mkdir()
    CheckpointStore(folder, Checkpoint()).clean()
    assert names(folder) == [".other.tmp", "step_00000010"]


def test_a_crash_between_the_renames_of_a_replacement_is_undone(tmp_path: Path, save: Save) -> None:
    folder = tmp_path / "checkpoints"
    save(10).folder.rename(folder / ".step_00000010.old")
    store = CheckpointStore(folder, Checkpoint())
    assert store.latest() is None
    store.clean()
    assert store.latest() is not None


def test_begin_starts_from_an_empty_folder(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", Checkpoint())
    (store.begin(3) / "stale.bin").write_bytes(b"1")
    assert names(store.begin(3)) == []
    assert store.commit(manifest_of(3)).manifest.files == {}


def test_killed_thirty_times_the_latest_is_always_complete(tmp_path: Path) -> None:
    folder, steps, left_over, chance = tmp_path / "checkpoints", [0], 0, random.Random(0)
    command = [sys.executable, "-c", WRITERS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for kills in itertools.count(1):
            print("write", file=writers.stdin, flush=True)
            writer = int(writers.stdout.readline())
            time.sleep(chance.uniform(0, 0.1))
            os.kill(writer, signal.SIGKILL)
            assert int(writers.stdout.readline()) == signal.SIGKILL
            left_over += any(folder.glob(".step_*"))
            steps.append(latest_step(folder))
            if kills >= 30 and steps[-1] >= 10:
                break
        writers.stdin.close()
    assert steps == sorted(steps)
    assert left_over, "some kills fell into a save"


def latest_step(folder: Path) -> int:
    """Return the newest step after checking every byte of it; 0 where there is none."""
    said: list[str] = []
    latest = CheckpointStore(folder, Checkpoint(), say=said.append).latest()
    assert said == [], "a visible checkpoint is complete from the start"
    if latest is None:
        return 0
    assert sorted(latest.manifest.files) == ["0.bin", "1.bin", "2.bin"]
    for name in latest.manifest.files:
        assert (latest.folder / name).read_bytes() == latest.manifest.step.to_bytes(8, "big") * 2000
    return latest.manifest.step


def test_a_checkpoint_that_is_gone_cannot_be_locked_for_removal(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="manifest"), RemovalLock(tmp_path) as lock:
        lock.acquire()
