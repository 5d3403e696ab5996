"""``launch doctor`` on this machine; tests/doctor/test_faults.py has others."""

import json
import os

from launcher.errors import EXIT_UNFIT


def test_this_machine_is_fit(launch, tmp_path):
    ended = launch("doctor", "--json").expect(0)
    report = json.loads(ended.stdout)
    (host,) = report["hosts"]
    facts = report["facts"][host["name"]]
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert set(facts["software"]["packages"]) == {"torch", "deepspeed", "transformers"}
    assert report["group"][host["name"]]["problem"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_is_unfit_has_an_exit_code_of_its_own(launch, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("nowhere.invalid slots=1\n")
    ended = launch("doctor", "backend=ssh", f"backend.hostfile={hostfile}").expect(EXIT_UNFIT)
    assert "error: nowhere.invalid: has a name that does not resolve" in ended.stdout
    assert "→ correct the name in the hostfile" in ended.stdout
    assert "1 error on 1 host" in ended.stdout
    as_json = launch("doctor", "--json", "backend=ssh", f"backend.hostfile={hostfile}").expect(EXIT_UNFIT).stdout
    assert [(it["host"], it["level"]) for it in json.loads(as_json)["findings"]] == [("nowhere.invalid", "error")]


def test_a_mistake_is_a_mistake_and_no_finding(launch):
    ended = launch("doctor", "backend=ssh", "backend.hostfile=missing").expect(2)
    assert "backend.hostfile=missing" in ended.stderr


def test_help_teaches(launch):
    ended = launch("doctor", "--help").expect(0)
    assert "69 a host is not fit" in ended.stdout
