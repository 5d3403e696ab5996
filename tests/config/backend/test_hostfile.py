"""The hostfile and its filters: what DeepSpeed means by them, and what it lets pass in silence."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from launcher.config.backend.hostfile import HostfileEntry, filter_hosts, read_hostfile
from launcher.errors import ConfigError, ConfigErrors
from tests.conftest import REPOSITORY


def written(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def refusals(error: pytest.ExceptionInfo[ConfigError]) -> list[ConfigError]:
    value = error.value
    return list(value.errors) if isinstance(value, ConfigErrors) else [value]


def chosen(entries: tuple[HostfileEntry, ...]) -> dict[str, tuple[int, ...]]:
    assert all(entry.slots == len(entry.devices) for entry in entries)
    return {entry.name: entry.devices for entry in entries}


@pytest.fixture
def three(tmp_path: Path) -> tuple[HostfileEntry, ...]:
    return read_hostfile(written(tmp_path, "worker-0 slots=4\nworker-1 slots=4\nworker-2 slots=2\n"))


def test_the_example_is_read_as_it_says() -> None:
    entries = read_hostfile(REPOSITORY / "hostfile.example")
    assert [(entry.user, entry.name, entry.port, entry.slots) for entry in entries] == [
        (None, "worker-0", None, 8),
        (None, "worker-1", None, 8),
        ("ada", "worker-2", None, 4),
        (None, "worker-3", 2222, 4),
        (None, "10.0.0.17", None, 2),
        ("ada", "fd00::12", 22, 2),
    ]
    assert entries[-1].ssh_destination == "ada@[fd00::12]:22"
    lines = (REPOSITORY / "hostfile.example").read_text().splitlines()
    assert all(lines[entry.line - 1].startswith(entry.ssh_destination) for entry in entries)


def test_comments_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(b"\xef\xbb\xbf# all\r\n\r\n  a slots=2 # two\r\n\tb\tslots=1\r\n")
    assert [(entry.name, entry.slots, entry.line) for entry in read_hostfile(path)] == [("a", 2, 3), ("b", 1, 4)]


def test_agrees_with_deepspeed(three: tuple[HostfileEntry, ...]) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    pool = collections.OrderedDict((entry.name, entry.slots) for entry in three)
    filters = ["worker-0", "worker-0@worker-1:0,2", "worker-2:1@worker-0:3,0", "worker-1:2@worker-1:0", "worker-1:1,1"]
    for text in filters:
        included = runner.parse_inclusion_exclusion(pool, text, "")
        assert chosen(filter_hosts(three, include=text)) == {name: tuple(slots) for name, slots in included.items()}
        excluded = runner.parse_inclusion_exclusion(pool, "", text)
        assert chosen(filter_hosts(three, exclude=text)) == {name: tuple(slots) for name, slots in excluded.items()}


def test_no_filter_leaves_all(three: tuple[HostfileEntry, ...]) -> None:
    assert filter_hosts(three) == three


def test_a_host_named_twice_has_all_it_was_named_with(three: tuple[HostfileEntry, ...]) -> None:
    """DeepSpeed forgets "all of it" when single slots follow."""
    assert chosen(filter_hosts(three, include="worker-0@worker-0:1")) == {"worker-0": (0, 1, 2, 3)}


def test_an_excluded_host_is_gone(three: tuple[HostfileEntry, ...]) -> None:
    assert chosen(filter_hosts(three, exclude="worker-1@worker-2:0,1")) == {"worker-0": (0, 1, 2, 3)}


def test_a_filter_names_an_ipv6_host_in_brackets(tmp_path: Path) -> None:
    entries = read_hostfile(written(tmp_path, "me@[fd00::1]:22 slots=4\nother slots=1\n"))
    assert chosen(filter_hosts(entries, include="[fd00:0::1]:2")) == {"fd00::1": (2,)}


@pytest.mark.parametrize(
    ("line", "why", "fix"),
    [
        ("worker slot=4", "'slot=4' is not recognized", "did you mean slots=4?"),
        ("worker slots=4 max=5", "'max=5' is not recognized", "write the line as: worker slots=4"),
        ("worker slots = 4", "'slots' is not recognized", "write the line as: worker slots=4"),
        ("worker", "worker has no slots", "write worker slots=N"),
        ("worker slots=", "slots is '', not a number", "from 1"),
        ("worker slots=two", "slots is 'two', not a number", "from 1"),
        ("worker slots=0", "slots is 0", "put # before"),
        ("worker slots=-1", "slots is -1", "from 1"),
        ("worker slots=99999", "slots is 99999", "to 4096"),
        ("worker slots=1 slots=2", "slots twice", "slots=N"),
        ("slots=4", "begins with 'slots=4'", "host"),
        ("-oProxyCommand=x slots=1", "begins with", "host"),
        ("-v slots=1", "begins with a dash", "own name"),
        ("-l@worker slots=1", "'-l' is not a user name", "letters"),
        ("me:hunter22@worker slots=1", "there is a password before a host", "ssh logs in with a key"),
        ("@worker slots=1", "'' is not a user name", "letters"),
        ("me@-worker slots=1", "begins with a dash", "own name"),
        ("$(reboot) slots=1", "not a host name", "letters"),
        ("a;b slots=1", "not a host name", "letters"),
        ("../etc slots=1", "not a host name", "letters"),
        ("wörker slots=1", "not a host name", "letters"),
        ("worker:x slots=1", "the port is 'x', not a number", "65535"),
        ("worker:0 slots=1", "the port is 0", "65535"),
        ("worker:70000 slots=1", "the port is 70000", "65535"),
        ("fd00::1 slots=1", "more than one colon", "brackets"),
        ("[fd00::1 slots=1", "is not a host", "brackets"),
        ("[fd00::zz] slots=1", "not an IPv6 address", "[fd00::1]"),
        ("[fe80::1%e$0] slots=1", "not a network interface", "eth0"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path: Path, line: str, why: str, fix: str) -> None:
    path = written(tmp_path, f"# hosts\ngood slots=1\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    (error,) = refusals(caught)
    assert (error.option, error.value, error.source) == ("backend.hostfile", path, f"{path}:3")
    assert why in error.why
    assert fix in error.fix


@pytest.mark.parametrize(
    ("line", "slots"),
    [
        ("worker-2 slots=4 max_slots=8", 4),  # Open MPI
        ("worker-2 slots=4 max-slots=8", 4),
        ("worker-2 max_slots=8 slots=4", 4),
        ("worker-2 cpu=2 slots=4 max_slots=8", 4),
        ("worker-2:4", 4),  # MPICH
        ("worker-2:4 binding=user:0,1", 4),
        ("worker-2:16 slots=2 ifname=eth0", 2),
        ("me@10.0.0.7:2", 2),
        ("worker-2 slots = 4", 4),
        ("worker-2 np=3", 3),
        ("worker-2 4", 4),  # LAM
        ("worker-2 4 all.q UNDEFINED", 4),  # Grid Engine
    ],
)
def test_advice_for_other_programs_hostfiles_works_when_followed(tmp_path: Path, line: str, slots: int) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hostfile(written(tmp_path, f"{line}\n"))
    (error,) = refusals(caught)
    advised = error.fix.partition("write the line as: ")[2].partition(" (")[0]
    (entry,) = read_hostfile(written(tmp_path, f"{advised}\n"))
    assert entry.slots == slots


def test_a_user_and_a_port_stay_in_the_advice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hostfile(written(tmp_path, "node1 slots=2 port=2222 user=ada\n"))
    (error,) = refusals(caught)
    assert error.fix == "write the line as: ada@node1:2222 slots=2"
    (entry,) = read_hostfile(written(tmp_path, error.fix.partition(": ")[2]))
    assert (entry.user, entry.port, entry.slots) == ("ada", 2222, 2)


def test_a_line_for_each_slot_is_one_message(tmp_path: Path) -> None:
    """As PBS and Open MPI write them."""
    with pytest.raises(ConfigError) as caught:
        read_hostfile(written(tmp_path, "a\nb slots=1\na\na\n"))
    (error,) = refusals(caught)
    assert error.why == "a has no slots=N, and is on 3 lines"
    (entry,) = read_hostfile(written(tmp_path, error.fix.partition("replace these lines by one: ")[2]))
    assert (entry.name, entry.slots) == ("a", 3)


@pytest.mark.parametrize("line", ["node[1-3] slots=4", "node[1,3]", "node[01-04]:22"])
def test_names_of_several_hosts_are_named_as_such(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hostfile(written(tmp_path, f"{line}\n"))
    (error,) = refusals(caught)
    assert "is a range of hosts" in error.why
    assert f"write a line for each of its hosts: node{line[5:6] if line[5] != '0' else '01'} slots=N, …" == error.fix


def test_all_wrong_lines_are_reported_together(tmp_path: Path) -> None:
    path = written(tmp_path, "a slots=0\nb slots=1\nc\nB slots=2\n")
    with pytest.raises(ConfigErrors) as caught:
        read_hostfile(path)
    assert [error.source for error in refusals(caught)] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert "is already on line 2" in refusals(caught)[-1].why


@pytest.mark.parametrize("text", ["", "\n\n", "# worker slots=1\n"])
def test_a_file_without_hosts_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="names no host"):
        read_hostfile(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_hostfile(tmp_path / "missing")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_hostfile(tmp_path)
    for data in (b"\x7fELF\0\0\0", b"\xff\xfe"):
        (tmp_path / "binary").write_bytes(data)
        with pytest.raises(ConfigError, match="is not a text file"):
            read_hostfile(tmp_path / "binary")


@pytest.mark.parametrize(
    ("text", "why", "fix"),
    [
        ("worker-9", "worker-9 is not in the hostfile", "did you mean worker-"),
        ("worker-0:4", "worker-0 has no slot '4'", "0,1,2,3"),
        ("worker-0:0-2", "worker-0 has no slot '0-2'", "one by one"),
        ("worker-0:", "worker-0 has no slot ''", "0,1,2,3"),
        ("worker-0:-1", "no slot '-1'", "0,1,2,3"),
        ("", "names no host", "HOST"),
        ("worker-0@", "names no host", "HOST"),
        ("worker-0,worker-1", "is not in the hostfile", "did you mean"),
    ],
)
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_filter_that_names_nothing_is_refused(
    three: tuple[HostfileEntry, ...], option: str, text: str, why: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        filter_hosts(three, **{option: text})
    (error,) = refusals(caught)
    assert (error.option, error.value) == (f"backend.{option}", text)
    assert why in error.why
    assert fix in error.fix


def test_all_errors_of_a_filter_are_reported_together(three: tuple[HostfileEntry, ...]) -> None:
    with pytest.raises(ConfigErrors) as caught:
        filter_hosts(three, include="worker-7@worker-0:9")
    assert len(refusals(caught)) == 2


def test_a_filter_must_leave_a_host(three: tuple[HostfileEntry, ...]) -> None:
    with pytest.raises(ConfigError, match="leaves no host"):
        filter_hosts(three, exclude="worker-0@worker-1@worker-2")


def test_include_and_exclude_together_are_refused(three: tuple[HostfileEntry, ...]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be used together with backend\.exclude=worker-1"):
        filter_hosts(three, include="worker-0", exclude="worker-1")
