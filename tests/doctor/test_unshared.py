"""What is refused where hosts keep the run directory each on its own disk."""

from dataclasses import replace

import pytest

from launcher.config.compose import compose
from launcher.doctor.rules import validate_shared_run_dir
from launcher.protocol.plan import Host

from .conftest import FactsOf

WANTED = ("checkpoint.every=5", "checkpoint.at_end=true", "backend.restarts=2")


def refused(facts_of: FactsOf, *words: str, num_hosts: int = 3, **storages: dict[str, object]) -> list[str]:
    hosts = [Host(name=f"node{number}", slots=1) for number in range(1, num_hosts + 1)]
    facts = {host.name: facts_of(1)["node1"] for host in hosts}
    for name, change in storages.items():
        facts[name] = replace(facts[name], storage=replace(facts[name].storage, **change))
    run = compose(words).run
    return [str(error) for error in validate_shared_run_dir(run, hosts, facts, folder="/runs/x")]


def test_what_needs_whole_checkpoints_is_refused_by_name(facts_of: FactsOf) -> None:
    every, at_end, restarts = refused(facts_of, *WANTED, node2={"is_shared": False})
    assert every.startswith("checkpoint.every=5: not all hosts share /runs/x (node2), and each would keep")
    assert "checkpoint.every=0 checkpoint.at_end=false" in at_end
    assert restarts.startswith("backend.restarts=2: ")
    assert all("run.root" in text for text in (every, at_end, restarts))


def test_a_run_that_wants_none_may_start(facts_of: FactsOf) -> None:
    assert refused(facts_of, "checkpoint.every=0", "checkpoint.at_end=false", node2={"is_shared": False}) == []


def test_a_job_that_saves_no_checkpoint_may_start(facts_of: FactsOf) -> None:
    serves = ("job=serve", "checkpoint.at_end=true")
    assert refused(facts_of, *serves, node2={"is_shared": False}) == []
    (restarts,) = refused(facts_of, *serves, "backend.restarts=2", node2={"is_shared": False})
    assert "would not find what every rank has written" in restarts


@pytest.mark.parametrize("kind", ["generate", "verify"])
def test_a_job_whose_ranks_read_the_files_of_others_is_refused(facts_of: FactsOf, kind: str) -> None:
    (refusal,) = refused(facts_of, f"job={kind}", node2={"is_shared": False})
    assert refusal.startswith(f"job={kind}: not all hosts share /runs/x (node2), and ranks of this job read")
    assert refused(facts_of, f"job={kind}") == []


@pytest.mark.parametrize("num_hosts", [1, 3])
def test_shared_or_alone(facts_of: FactsOf, num_hosts: int) -> None:
    apart = {"node1": {"is_shared": False}} if num_hosts == 1 else {}
    assert refused(facts_of, *WANTED, num_hosts=num_hosts, **apart) == []


def test_hosts_with_a_server_of_their_own(facts_of: FactsOf) -> None:
    served = {"is_shared": False, "served_by": "nfs4 server:/export /me/runs"}
    assert refused(facts_of, *WANTED, node1=served, node2=served, node3=served) == []
    assert refused(facts_of, *WANTED, node1=served, node2=served, node3={**served, "served_by": "nfs4 other:/ /"})
    assert refused(facts_of, *WANTED, node1=served, node2=served, node3={"is_shared": False})


def test_many_hosts_are_not_all_listed(facts_of: FactsOf) -> None:
    apart = {f"node{number}": {"is_shared": False} for number in range(1, 11)}
    assert "(node1, node2, node3 and 7 more)" in refused(facts_of, *WANTED, num_hosts=10, **apart)[0]
