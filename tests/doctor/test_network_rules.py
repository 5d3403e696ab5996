"""What the rules make of what hosts measured."""

from __future__ import annotations

from launcher.doctor.protocol import Contact, GroupMeasurement, PairMeasurement
from launcher.doctor.report import Finding, Level
from launcher.doctor.rules import contact_rules, group_rules, pair_rules, port_rules

FIRST = Contact(interface="eth0", local_address="10.0.0.1", latency_s=None, problem=None)
FINE = Contact(interface="eth0", local_address="10.0.0.2", latency_s=0.0002, problem=None)
SLOW = Contact(interface="eth0", local_address="10.0.0.3", latency_s=0.4, problem=None)
SHUT = Contact(interface="eth0", local_address="10.0.0.3", latency_s=None, problem="connection refused")


def met(*others: Contact) -> list[Finding]:
    """Return the findings on the first host and others."""
    return list(contact_rules({f"node{number}": found for number, found in enumerate((FIRST, *others), 1)}, port=29500))


def test_all_is_well() -> None:
    assert met() == met(FINE) == met(FINE, FINE) == []


def test_a_host_that_cannot_reach_the_first() -> None:
    (finding,) = met(FINE, SHUT)
    assert (finding.host, finding.level) == ("node3", Level.ERROR)
    assert finding.what == "cannot reach port 29500 of node1: connection refused"


def test_when_no_host_reaches_the_first_it_is_the_first_that_is_named() -> None:
    (finding,) = met(SHUT, SHUT)
    assert (finding.host, finding.what) == ("node1", "no other host reaches its port 29500: connection refused")


def test_a_slow_link_is_named_at_its_end() -> None:
    (finding,) = met(FINE, SLOW)
    assert (finding.host, finding.level) == ("node3", Level.WARNING)
    assert "400.0 ms over eth0" in finding.what
    (finding,) = met(SLOW, SLOW)
    assert (finding.host, finding.level) == ("node1", Level.WARNING)


def test_a_name_that_leads_back_to_the_host_itself() -> None:
    (finding,) = met(Contact(interface="lo", local_address="127.0.1.1", latency_s=0.0001, problem=None))
    assert (finding.host, finding.level) == ("node2", Level.ERROR)
    assert "leads to itself (127.0.1.1)" in finding.what


def test_a_port_that_cannot_be_opened() -> None:
    (finding,) = port_rules("node1", port=29500, problem="Address already in use")
    assert "port 29500" in finding.what
    assert "backend.port=auto" in finding.remedy


def pair(first: int, second: int, *, speed: float = 1e9, latency: float = 2e-4) -> PairMeasurement:
    """Return one measurement."""
    return PairMeasurement(hosts=(f"node{first}", f"node{second}"), latency_s=latency, bytes_per_s=speed)


def test_pairs_that_fail_or_crawl() -> None:
    fine = [pair(1, 2), pair(1, 3), pair(2, 3)]
    assert list(pair_rules(fine)) == []
    broken = PairMeasurement(hosts=("node1", "node4"), problem="timed out")
    (finding,) = pair_rules([*fine, broken])
    assert (finding.host, finding.level) == ("node4", Level.ERROR)
    (finding,) = pair_rules([*fine, pair(3, 4, speed=1e8)])
    assert (finding.host, finding.level) == ("node4", Level.WARNING)
    assert "node3 carries 95.37 MiB/s, the median of all pairs is 953.67 MiB/s" in finding.what
    (finding,) = pair_rules([pair(1, 2, speed=1e6)])
    assert "976.56 KiB/s" in finding.what
    (finding,) = pair_rules([pair(1, 2, latency=0.02)])
    assert "20.0 ms" in finding.what


def test_hosts_without_figures() -> None:
    found = list(group_rules({"node1": GroupMeasurement(problem="timed out")}, silent={"node2": "exit code 1: ouch"}))
    assert [(finding.host, finding.level) for finding in found] == [("node1", Level.ERROR), ("node2", Level.ERROR)]
