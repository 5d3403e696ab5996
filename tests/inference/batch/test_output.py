"""Answers on disk: whatever a killed process leaves, no answer is lost, repeated or damaged."""

from __future__ import annotations

import json

import pytest

from launcher.inference.batch.output import PartIndex, PartWriter, merge_parts


def answer(number: int) -> bytes:
    return json.dumps({"line": number, "text": "é" * number}, ensure_ascii=False).encode()


def index_of(folder, size: int) -> PartIndex:
    found = PartIndex(folder, size)
    found.scan()
    return found


def test_answers_of_several_ranks_in_any_order_become_one_file_in_order(tmp_path) -> None:
    with PartWriter(tmp_path / "rank0.part") as zero, PartWriter(tmp_path / "rank1.part") as one:
        for number in (4, 0, 2):
            zero.append(number, answer(number), tokens=number)
        one.append(3, answer(3), is_error=True)
        index = index_of(tmp_path, 5)
        assert not index.is_complete
        assert [number in index for number in range(5)] == [True, False, True, True, True]
        one.append(1, answer(1), tokens=1)
        index.scan()
    assert index.is_complete
    assert (index.num_done, index.num_errors, index.num_tokens) == (5, 1, 7)
    merge_parts(index, tmp_path / "out", heartbeat=lambda: None)
    assert (tmp_path / "out").read_bytes() == b"".join(answer(number) + b"\n" for number in range(5))
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_file_cut_at_any_byte_holds_its_whole_answers_and_goes_on(tmp_path) -> None:
    with PartWriter(tmp_path / "whole") as writer:
        for number in range(3):
            writer.append(number, answer(number))
        assert len(answer(2)) < 40  # a folder is made for every byte
    whole = (tmp_path / "whole").read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "rank0.part").write_bytes(whole[:cut])
        with PartWriter(folder / "rank0.part") as writer:
            done = index_of(folder, 3)
            assert done.num_done in (sum(end <= cut for end in ends), sum(end - 1 <= cut for end in ends))
            for number in range(3):
                if number not in done:
                    writer.append(number, answer(number))
        merge_parts(index_of(folder, 3), folder / "out", heartbeat=lambda: None)
        assert (folder / "out").read_bytes() == b"".join(answer(number) + b"\n" for number in range(3))


@pytest.mark.parametrize("damage", [b"\0" * 40, b"7 1 a 00000000 {}", b"0 1 a zz {}", b"9 0 a 5d5cb1b3 {}"])
def test_damage_in_the_middle_costs_only_what_it_hit(tmp_path, damage) -> None:
    with PartWriter(tmp_path / "rank0.part") as writer:
        writer.append(0, answer(0))
    with (tmp_path / "rank0.part").open("ab") as file:
        file.write(damage)
    with PartWriter(tmp_path / "rank0.part") as writer:
        writer.append(1, answer(1))
    index = index_of(tmp_path, 2)
    assert (index.num_done, index.is_complete) == (2, True)


def test_an_answer_that_came_twice_counts_once(tmp_path) -> None:
    for rank, text in enumerate((b'"first"', b'"second"')):
        with PartWriter(tmp_path / f"rank{rank}.part") as writer:
            writer.append(0, text, tokens=1)
    index = index_of(tmp_path, 1)
    assert (index.num_done, index.num_tokens) == (1, 1)
    assert list(index.answers()) == [b'"first"\n']
