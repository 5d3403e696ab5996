"""Ranks that stand still in real collectives under the real torchrun: the straggler is named, with its line."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.protocol.plan import Host
from tests.ports import free_port

WORKER = Path(__file__).parent / "programs" / "worker.py"
ASKED = {
    "late": {0: "meet sum_later", 1: "meet read_batch", 2: "meet sum_later"},
    "elsewhere": {0: "meet sum_later", 1: "meet receive", 2: "meet sum_later"},
    "stopped": {0: "meet sum_later", 1: "meet freeze"},
    "never came": {0: "meet", 1: "some_steps"},
    "left": {0: "meet sum_later", 1: "meet leave"},
    "died": {0: "stubborn meet sum_later", 1: "meet wait_a_moment kill_itself"},
}


def line_of(function: str, code: str) -> str:
    """Return how the line of the test program that holds ``code``, in ``function``, is named."""
    lines = WORKER.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"def {function}("))
    number = next(number for number, line in enumerate(lines) if number > first and code in line)
    return f"worker.py:{number + 1} in {function}"


WAITS = f"all_reduce ({line_of('sum_over_ranks', 'all_reduce')})"


@pytest.fixture(scope="module")
def ended(supervise, plan_of, preloading):
    """Every run of this file, some at a time: name to run and exit code."""

    hosts = {size: Host(name="box", slots=size, cores=4, memory_bytes=2**34) for size in (2, 3)}
    plans = {size: plan_of(hosts=[host]) for size, host in hosts.items()}

    def run(name):
        do = ASKED[name]
        started = supervise(do, plan=plans[len(do)], torchrun_on=free_port(), stall_timeout_s=10.0, start=preloading)
        return name, (started, started.end(300))

    with ThreadPoolExecutor(len(ASKED)) as threads:
        return dict(threads.map(run, ASKED))


def places(run):
    return {place["rank"]: (place["where"], place["collective"]) for place in run.failure["ranks"]}


def test_a_rank_that_comes_late(ended):
    run, code = ended["late"]
    assert code == 124, run.text
    at = line_of("read_batch", "sleep(600)")
    reason = run.failure["reason"]
    assert re.match(r"rank 1 on box has not moved for \d+ s \(last seen in data of step 2\): it is at ", reason)
    assert reason.endswith(f"it is at {at} while ranks 0, 2 wait in {WAITS}")
    waiting = (line_of("sum_over_ranks", "all_reduce"), "all_reduce")
    assert places(run) == {0: waiting, 1: (at, ""), 2: waiting}
    assert f"rank 1 on box: data, step 2, silent for {run.failure['ranks'][1]['silent_s']:.0f} s, at {at}" in run.stderr
    stacks = run.run_dir.stacks.read_text()
    assert stacks.count("── rank ") == 3
    assert "in read_batch" in stacks
    assert "in read_batch" in run.failure["traceback"]
    assert "stack" not in run.failure["ranks"][0]


def test_a_rank_in_another_collective_than_most(ended):
    run, code = ended["elsewhere"]
    assert code == 124, run.text
    at = line_of("receive", "recv(")
    assert run.failure["rank"] == 1
    assert run.failure["reason"].endswith(f"it is in recv ({at}) while ranks 0, 2 wait in {WAITS}")


def test_a_rank_that_was_stopped(ended):
    run, code = ended["stopped"]
    assert code == 124, run.text
    at = line_of("freeze", "os.kill")
    assert run.failure["rank"] == 1
    assert run.failure["reason"].endswith(f"it was stopped by a signal at {at} while rank 0 waits in {WAITS}")


def test_a_rank_that_ended_well_before_the_others_met_it(ended):
    run, code = ended["never came"]
    assert code == 124, run.text
    at = line_of("meet", "init_process_group")
    assert run.failure["rank"] == 1
    assert run.failure["reason"] == (
        f"rank 1 on box left early, at step 3 of 300, with exit code 0; rank 0 waits in init_process_group ({at})"
    )


def test_a_rank_that_ended_well_while_the_others_needed_it(ended):
    run, code = ended["left"]
    assert code == 1, run.text
    assert run.failure["rank"] == 1
    assert run.failure["reason"].startswith(
        "rank 1 on box left early, at step 2 of 300, with exit code 0; then rank 0 on box failed: RuntimeError:"
    )
    assert [victim["rank"] for victim in run.failure["victims"]] == [0]


def test_where_the_others_were_when_a_rank_died_without_a_word(ended):
    run, code = ended["died"]
    assert code == 137, run.text
    assert run.failure["rank"] == 1
    assert places(run) == {0: (line_of("sum_over_ranks", "all_reduce"), "all_reduce")}
    assert f"in {WAITS}" in run.stderr
