"""Tensors of a checkpoint: any part that any ranks wrote is read as any other part."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from launcher.checkpoint.regions import Box, FlatRange, Region, boxes_of, flat_start, slices, whole
from launcher.checkpoint.tensors import Shard, StoredState, safetensors_dtype, write_shards


def cut_rows(shape: tuple[int, ...], num: int, dim: int) -> list[Region]:
    """Return boxes of about equal size along one dimension, as FSDP and tensor slices have them."""
    length = shape[dim]
    edges = [length * part // num for part in range(num + 1)]
    found: list[Region] = []
    for start, stop in itertools.pairwise(edges):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = start, stop - start
        found.append(Box(tuple(offsets), tuple(sizes)))
    return found


def cut_flat(shape: tuple[int, ...], num: int) -> list[Region]:
    """Return ranges of about equal size, as ZeRO has them."""
    numel = math.prod(shape)
    edges = [numel * part // num for part in range(num + 1)]
    return [FlatRange(start, stop) for start, stop in itertools.pairwise(edges)]


def values_of(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    if isinstance(region, Box):
        return tensor[slices(region)]
    return tensor.flatten()[region.start : region.stop]


def shard(name: str, tensor: torch.Tensor, region: Region) -> Shard:
    return Shard(
        name=name,
        shape=tuple(tensor.shape),
        region=region,
        dtype=tensor.dtype,
        read=lambda: values_of(tensor, region),
    )


def write(folder: Path, tensors: dict[str, tuple[torch.Tensor, list[Region]]]) -> list[Path]:
    """Write the parts of each tensor to as many files as it has parts."""
    files = []
    for rank in range(max(len(regions) for _, regions in tensors.values())):
        own = [shard(n, t, regions[rank]) for n, (t, regions) in tensors.items() if rank < len(regions)]
        files.append(folder / f"rank_{rank}.safetensors")
        write_shards(files[-1], own)
    return files


EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    num = draw(st.integers(1, 4))
    if not shape or draw(st.booleans()):
        return cut_flat(shape, num)
    return cut_rows(shape, num, draw(st.integers(0, len(shape) - 1)))


@EXAMPLES
@given(data=st.data(), shape=shapes)
def test_every_part_is_read_from_every_cut(
    data: st.DataObject, shape: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    files = write(tmp_path_factory.mktemp("state"), {"w": (tensor, data.draw(cuts(shape)))})
    stored = StoredState(files)
    for region in data.draw(cuts(shape)):
        assert torch.equal(stored.read("w", region), values_of(tensor, region))
    assert torch.equal(stored.read("w"), tensor)


@EXAMPLES
@given(data=st.data(), shape=shapes)
def test_boxes_of_a_range_are_runs_of_the_flat_tensor(data: st.DataObject, shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    flat = torch.arange(numel).view(shape)
    position, boxes = start, list(boxes_of(FlatRange(start, stop), shape))
    for box in boxes:
        assert flat_start(box, shape) == position
        assert flat[slices(box)].flatten().tolist() == list(range(position, position + box.numel))
        position += box.numel
    assert position == stop
    assert len(boxes) <= 2 * len(shape) + 1


def test_the_file_is_a_safetensors_file_with_its_checksum(tmp_path: Path) -> None:

    tensor = torch.randn(7, 3)
    file = tmp_path / "rank.safetensors"
    written = write_shards(file, [shard("w", tensor, r) for r in cut_rows((7, 3), 2, 0)])
    assert written.checksum == xxhash.xxh3_128(file.read_bytes()).hexdigest()
    assert written.num_bytes == file.stat().st_size
    assert torch.equal(torch.cat(list(load_file(file).values())), tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64])
def test_formats(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).view(2, 3).to(dtype)
    stored = StoredState(write(tmp_path, {"w": (tensor, cut_flat((2, 3), 4))}))
    assert stored.dtype("w") == dtype
    assert torch.equal(stored.read("w"), tensor)


def test_the_bytes_read_are_counted_of_those_expected(tmp_path: Path) -> None:
    stored = StoredState(write(tmp_path, {name: (torch.randn(4, 3), cut_rows((4, 3), 2, 0)) for name in "ab"}))
    progress: list[tuple[int, int]] = []
    stored.on_progress = lambda done, total: progress.append((done, total))
    regions: dict[str, Region] = {"a": whole((4, 3)), "b": FlatRange(0, 5)}
    stored.expect(regions.items())
    for name, region in regions.items():
        stored.read(name, region)
    assert progress == [(24, 68), (48, 68), (60, 68), (68, 68)], "after each piece of a file"


def test_a_file_that_is_missing_is_noticed(tmp_path: Path) -> None:
    files = write(tmp_path, {"w": (torch.randn(4, 3), cut_rows((4, 3), 2, 0))})
    with pytest.raises(ValueError, match=r"w of shape \(4, 3\) has 6 of 12 elements"):
        StoredState(files[:1])


def test_shapes_that_differ_are_refused(tmp_path: Path) -> None:
    one, other = torch.randn(4, 3), torch.randn(4, 4)
    write_shards(tmp_path / "a", [shard("w", one, cut_rows((4, 3), 2, 0)[0])])
    write_shards(tmp_path / "b", [shard("w", other, cut_rows((4, 4), 2, 0)[1])])
    with pytest.raises(ValueError, match=r"w has shape \(4, 4\) in one file and \(4, 3\) in another"):
        StoredState([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("damage", ["cut", "foreign", "text"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    (file,) = write(tmp_path, {"w": (torch.randn(4, 3), cut_rows((4, 3), 1, 0))})
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "text":
        file.write_text("no tensors")
    else:
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"rank_0.safetensors is not a file of a checkpoint"):
        StoredState([file])


def test_what_was_read_of_a_file_does_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a mapped file count as memory of the process once they were touched."""
    monkeypatch.setattr("launcher.checkpoint.tensors._MOST_MAPPED_BYTES", 64)
    opened: list[object] = []

    def counting_open(*words: Any, **options: Any) -> Any:
        opened.append(words)
        return safe_open(*words, **options)

    monkeypatch.setattr("launcher.checkpoint.tensors.safe_open", counting_open)
    tensors = {name: torch.randn(4, 3) for name in "abcd"}
    stored = StoredState(write(tmp_path, {name: (value, cut_rows((4, 3), 2, 0)) for name, value in tensors.items()}))
    for name, tensor in tensors.items():
        assert torch.equal(stored.read(name), tensor)
    assert len(opened) > 2, "each of the two files is mapped again after 64 bytes"


@pytest.mark.parametrize("shape", [(40,), (9, 5), (2, 3, 30), (3, 1, 7)])
@pytest.mark.parametrize("written", [cut_flat, lambda shape, num: cut_rows(shape, num, len(shape) - 1)])
def test_a_large_part_is_copied_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], written: Callable[..., list[Region]]
) -> None:
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    stored = StoredState(write(tmp_path, {"w": (tensor, written(shape, 2))}))
    copied: list[int] = []
    copy = torch.Tensor.copy_

    def recorded(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        copied.append(values.nbytes)
        return copy(target, values)

    monkeypatch.setattr(torch.Tensor, "copy_", recorded)
    monkeypatch.setattr("launcher.checkpoint.tensors._PIECE_BYTES", 16)
    for region in [whole(shape), *cut_flat(shape, 3), *cut_rows(shape, 2, 0)]:
        target = torch.full(values_of(tensor, region).shape, -1.0, dtype=torch.float64)
        stored.read_into(target, "w", region)
        assert torch.equal(target.float(), values_of(tensor, region))
    assert 0 < max(copied) <= 16


@pytest.mark.parametrize("region", [Box((0,), (4,)), Box((3, 0), (2, 3)), Box((0, -1), (1, 1)), FlatRange(11, 13)])
def test_a_part_that_a_tensor_cannot_have_is_refused(region: Region) -> None:
    with pytest.raises(ValueError, match=r"w of shape \(4, 3\) has no part"):
        StoredState().add("w", (4, 3), region, torch.ones(4), dtype=torch.float32, file=Path("a"))


def test_elements_that_no_file_has_are_not_made_up() -> None:
    stored = StoredState()
    stored.add("w", (4, 3), Box((0, 0), (3, 3)), torch.ones(3, 3), dtype=torch.float32, file=Path("a"))
    assert torch.equal(stored.read("w", FlatRange(2, 9)), torch.ones(7))
    with pytest.raises(ValueError, match="w: the files have 9 of 12 elements"):
        stored.read("w")


def test_a_format_that_no_checkpoint_has_is_named() -> None:
    assert safetensors_dtype("BF16") == torch.bfloat16
    with pytest.raises(ValueError, match="values of format F4 are not read from checkpoints"):
        safetensors_dtype("F4")
