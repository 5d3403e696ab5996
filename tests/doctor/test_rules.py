"""What the rules make of facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from launcher.doctor.protocol import HostFacts
from launcher.doctor.report import Finding, Level
from launcher.doctor.rules import CLOCK_SKEW_S, host_rules
from launcher.protocol.plan import Host

from .conftest import FactsOf

CODE = "ab" * 32
MIB = 2**20


def judged(facts: Mapping[str, HostFacts], *, skew_s: float = 0.0, **host: Any) -> list[Finding]:
    """Return the findings on hosts of one slot each, with the clock of the last off by ``skew_s``."""
    hosts = [Host(name=name, **{"slots": 1, **host}) for name in facts]
    skews = dict.fromkeys(facts, 0.0) | {hosts[-1].name: skew_s}
    return list(host_rules(hosts, facts, skews_s=skews, code_hash=CODE))


def test_healthy_hosts_have_no_findings(facts_of: FactsOf) -> None:
    assert judged(facts_of(3)) == []


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"python": "3.12.1"}, Level.ERROR, "python is 3.12.1 and most have 3.11.7"),
        ({"python": "3.11.9"}, Level.WARNING, "python is 3.11.9"),
        ({"packages": {"torch": "2.12.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}}, Level.ERROR, "torch is"),
        ({"packages": {"torch": "2.13.1", "deepspeed": "0.19.8", "transformers": "5.23.0"}}, Level.WARNING, "2.13.1"),
        ({"packages": {"torch": "2.13.0", "transformers": "5.23.0"}}, Level.ERROR, "deepspeed is not installed"),
        ({"cuda": "12.8"}, Level.ERROR, "torch's CUDA is 12.8 and most have none"),
        ({"nccl": "2.27.3"}, Level.ERROR, "NCCL is 2.27.3"),
        ({"code_hash": "cd" * 32}, Level.ERROR, "its launcher code is cdcdcdcdcdcd"),
        ({"architecture": "aarch64"}, Level.ERROR, "architecture is aarch64 and most have x86_64"),
        ({"problem": "Read-only file system"}, Level.ERROR, "/runs: Read-only file system"),
        ({"free_bytes": 5 * MIB}, Level.ERROR, "is full: 5.00 MiB left"),
        ({"free_bytes": 5120 * MIB}, Level.WARNING, "little disk is left"),
        ({"is_shared": False}, Level.WARNING, "is not the folder of that name on this machine"),
        ({"free_memory_bytes": 100 * MIB}, Level.WARNING, "little memory is free"),
        ({"shm_bytes": 64 * MIB, "shm_free_bytes": 60 * MIB}, Level.WARNING, "60.00 MiB of 64.00 MiB in /dev/shm"),
        ({"hostname": "node1", "address": "10.0.0.1"}, Level.ERROR, "is the same machine as node1"),
    ],
)
def test_what_differs_is_named_with_its_host(
    facts_of: FactsOf, change: dict[str, Any], level: Level, words: str
) -> None:
    found = judged(facts_of(3, **change))
    assert [(finding.host, finding.level) for finding in found] == [("node3", level)]
    assert words in found[0].what
    assert found[0].remedy


def test_of_two_hosts_the_first_is_the_measure(facts_of: FactsOf) -> None:
    (finding,) = judged(facts_of(2, python="3.12.1"))
    assert (finding.host, finding.what) == ("node2", "python is 3.12.1 and node1 has 3.11.7")


def test_a_differing_driver_is_no_error(facts_of: FactsOf) -> None:
    facts = {**facts_of(1, driver="580.1"), "node2": facts_of(2, driver="570.1")["node2"]}
    (finding,) = judged(facts)
    assert (finding.level, finding.what) == (Level.WARNING, "NVIDIA driver is 570.1 and node1 has 580.1")


@pytest.mark.parametrize(("skew_s", "words"), [(-9.0, "9.0 s behind"), (9.0, "9.0 s ahead of"), (CLOCK_SKEW_S, None)])
def test_clocks_apart(facts_of: FactsOf, skew_s: float, words: str | None) -> None:
    found = judged(facts_of(2), skew_s=skew_s)
    assert [words in finding.what for finding in found if words] == [True] * len(found)
    assert bool(found) == (words is not None)


def test_slots_against_devices(facts_of: FactsOf) -> None:
    gpus = {"devices": ("H200", "H200"), "device_ids": ("0", "1")}
    facts = facts_of(1, **gpus)
    assert judged(facts, slots=2) == []
    (finding,) = judged(facts, slots=3)
    assert (finding.level, finding.what) == (Level.ERROR, "has 3 ranks and shows 2 GPUs")
    (finding,) = judged(facts, slots=2, slot_ids=(1, 2))
    assert finding.what == "shows 2 GPUs, and the filter chooses slot 2"
    (finding,) = judged(facts_of(1), slots=9)
    assert (finding.level, finding.what) == (Level.WARNING, "is given 9 ranks and has 8 cores")
    assert finding.remedy == "set backend.ranks=8"
    (finding,) = judged(facts_of(1), slots=9, ssh_destination="node1")
    assert finding.remedy == "write slots=8 in the hostfile"


def test_a_host_without_gpus_among_hosts_with(facts_of: FactsOf) -> None:
    facts = {**facts_of(1, devices=("H200",), device_ids=("0",)), "node2": facts_of(2)["node2"]}
    (finding,) = judged(facts)
    assert (finding.host, finding.level, finding.what) == ("node2", Level.ERROR, "shows no GPU, and node1 does")
