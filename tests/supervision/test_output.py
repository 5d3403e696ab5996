"""What ranks print: whole lines, with their origin, and nothing lost."""

import pytest

from launcher.utils.logs import LineSplitter, LogTail


@pytest.fixture(scope="module")
def odd(supervise):
    run = supervise({0: "print_odd_lines", 1: "some_steps"})
    assert run.end() == 0, run.text
    return run


@pytest.mark.parametrize(
    "line",
    [
        "grüße 你好",
        "binary \ufffd\ufffd",
        "bar 3",
        "x" * 300_000,
        "???",
        "in two pieces",
        "from a child",
        "no end",
    ],
)
def test_every_line_is_shown_whole_and_once(odd, line):
    assert odd.stdout.splitlines().count(f"box:0 | {line}") == 1


def test_the_log_holds_the_bytes_as_they_were(odd):
    log = odd.run_dir.log_of("box", 0).read_bytes()
    assert b"binary \xff\xfe\n" in log
    assert b"bar 1\rbar 2\rbar 3\n" in log
    assert log.endswith(b"no end")


def test_only_the_chosen_ranks_are_shown(supervise):
    run = supervise("some_steps", show_ranks=(1,))
    run.end()
    assert "box:1 | step 3\n" in run.stdout
    assert "box:0" not in run.stdout
    assert "step 3\n" in run.run_dir.log_of("box", 0).read_text()


def test_much_output_arrives_in_order_and_complete(supervise):
    run = supervise({0: "print_much", 1: "some_steps"})
    run.end()
    lines = [line.split()[2] for line in run.stdout.splitlines() if line.startswith("box:0 |")]
    assert lines == [str(number) for number in range(20_000)]


def test_a_reader_that_goes_away_does_not_end_the_run(supervise):
    run = supervise({0: "print_much", 1: "some_steps"}, reader="head")
    assert run.end() == 0
    assert run.result["status"] == "completed"


def test_splitting():
    splitter = LineSplitter()
    assert splitter.feed(b"a") == []
    assert splitter.feed("b\nü".encode()[:-1]) == ["ab"]
    assert splitter.feed("ü".encode()[1:]) == []
    assert splitter.rest() == ["ü"]
    assert splitter.rest() == []


def test_a_line_without_end_does_not_fill_the_memory():
    splitter = LineSplitter()
    pieces = [piece for _ in range(40) for piece in splitter.feed(b"x" * 100_000)]
    assert len(pieces) >= 3
    assert sum(map(len, [*pieces, *splitter.rest()])) == 4_000_000


def test_a_tail_begins_where_the_file_ends(tmp_path):
    path = tmp_path / "log"
    path.write_text("earlier\n")
    tail = LogTail(path)
    with path.open("a") as file:
        file.write("now\nand th")
    assert tail.read() == ["now"]
    assert tail.last(5) == "now\nand th"
    assert tail.drain() == ["and th"]
    tail.close()


def test_a_tail_waits_for_its_file(tmp_path):
    tail = LogTail(tmp_path / "log")
    assert tail.read() == []
    assert tail.last(5) == ""
    (tmp_path / "log").write_text("here\n")
    assert tail.read() == ["here"]
    tail.close()
