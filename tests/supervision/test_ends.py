"""How runs end: the exit code is that of the first failing rank, and the cause is named."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from launcher.protocol.plan import Command
from launcher.supervision.finalize import remove_previous_result
from tests.conftest import start_interpreter

DEEDS = [
    ("exit_3", 3, "failed: SystemExit: 3"),
    ("exit_77_at_once", 77, "ended with exit code 77"),
    ("kill_itself", 137, "was ended by signal 9 (SIGKILL)"),
    ("segfault", 139, "was ended by signal 11 (SIGSEGV)"),
    ("value_error", 1, "failed: ValueError: a planted mistake, grüße"),
    ("job_error", 1, "failed: loss is nan at step 7 on rank 0"),
    ("config_error", 65, "its hash differs"),
    ("environment_problem", 69, "the weights cannot be fetched"),
]
OTHERS = {
    "well": {"do": "some_steps"},
    "patient": {"do": {0: "connection_error", 1: "wait_a_moment value_error"}, "env": {"PATIENT": "1"}},
    "unexplained": {"do": {0: "connection_error", 1: "work"}},
    "hanging": {"do": {0: "work", 1: "hang_after_error"}},
    "preempted": {"do": {0: "work", 1: "wait_a_moment exit_75"}},
    "broken": {"do": "work", "agent_command": Command(argv=(sys.executable, "-c", "import no_such_module"))},
    "absent": {"do": "work", "agent_command": Command(argv=("/no/such/program",))},
    "lazy": {"do": "work", "agent_command": Command(argv=("true",))},
    "port": {"do": {0: "port_error", 1: "wait_a_moment work"}},
    "late port": {"do": {0: "some_steps wait_a_moment port_error", 1: "work"}},
}


@pytest.fixture(scope="module")
def ended(supervise, preloading):
    """Every run of this file, several at a time and all forked but one: name to run and exit code."""
    asked = {deed: {"do": {0: "work", 1: f"wait_a_moment {deed}"}} for deed, *_ in DEEDS} | OTHERS

    def run(name):
        start = start_interpreter if name == "well" else partial(preloading, kind="supervision")
        started = supervise(**asked[name], start=start)
        return name, (started, started.end())

    with ThreadPoolExecutor(6) as threads:
        return dict(threads.map(run, asked))


def test_a_run_that_goes_well(ended):
    run, code = ended["well"]
    assert code == 0, run.text
    assert "box:0 | step 3\n" in run.stdout
    assert "box:1 | step 3\n" in run.stdout
    assert run.stderr == ""
    assert run.result["status"] == "completed"
    assert not run.run_dir.failure.exists()
    assert run.run_dir.log_of("box", 1).read_text().endswith("step 3\n")


@pytest.mark.parametrize(("deed", "code", "said"), DEEDS)
def test_the_exit_code_is_the_first_failing_ranks_own(ended, deed, code, said):
    run, returned = ended[deed]
    assert returned == code, run.text
    assert run.failure["rank"] == 1
    assert run.failure["host"] == "box"
    assert run.failure["exit_code"] == run.result["exit_code"] == code
    assert said in run.failure["reason"]
    assert [victim["rank"] for victim in run.failure["victims"]] == [0]
    assert run.result["status"] == "failed"
    last = run.stderr.splitlines()
    assert said in last[-1]
    assert last[-2] == f"log: {run.run_dir.log_of('box', 1)}"
    assert last[-3] == "ended with it: rank 0 on box (SIGTERM)"


def test_the_traceback_is_the_last_thing_printed(ended):
    run, _ = ended["value_error"]
    block = run.stderr[run.stderr.index("── the run failed") :]
    assert 'raise ValueError("a planted mistake, grüße")' in block
    assert 'raise ValueError("a planted mistake, grüße")' in run.failure["traceback"]
    assert "launcher/supervision" not in run.failure["traceback"]
    assert run.text.count('raise ValueError("a planted mistake') == 1, "not as it came, and then again"
    assert f"next: launch logs {run.run_dir.path} --rank 1" in block
    assert "Traceback" in run.run_dir.log_of("box", 1).read_text()


def test_a_message_for_the_user_has_no_traceback(ended):
    run, _ = ended["config_error"]
    assert "Traceback" not in run.text
    assert run.text.count("its hash differs; start the run again") == 1, "once, at the end"
    assert "its hash differs" in run.run_dir.log_of("box", 1).read_text()


def test_death_without_python_shows_the_end_of_the_log(ended):
    run, _ = ended["segfault"]
    assert "Fatal Python error: Segmentation fault" in run.failure["traceback"]
    assert "in segfault" in run.failure["traceback"]


def test_a_consequence_is_not_the_cause(ended):
    run, code = ended["patient"]
    assert code == 1
    assert run.failure["rank"] == 1, run.text
    assert run.failure["victims"] == [{"rank": 0, "host": "box", "exit_code": 1, "signal": None}]


def test_an_unexplained_lost_connection_is_the_cause(ended):
    run, code = ended["unexplained"]
    assert code == 1
    assert run.failure["rank"] == 0


def test_a_rank_that_fails_and_hangs_is_ended(ended):
    run, code = ended["hanging"]
    assert code == 1
    assert "ValueError" in run.failure["error"]
    assert run.failure["exit_code"] == 1


def test_a_preempted_run_says_so(ended):
    run, code = ended["preempted"]
    assert code == 75
    assert run.result["status"] == "preempted"
    assert not run.run_dir.failure.exists()


def test_ranks_that_cannot_even_start(ended):
    run, code = ended["broken"]
    assert code == 1
    assert "No module named 'no_such_module'" in run.failure["traceback"]
    assert "No module named 'no_such_module'" in run.stderr


def test_a_program_that_does_not_exist(ended):
    run, code = ended["absent"]
    assert code == 127
    assert "/no/such/program cannot be started: No such file or directory" in run.stderr


def test_a_launcher_that_ends_well_without_its_ranks_is_a_failure(ended):
    run, code = ended["lazy"]
    assert code == 1
    assert "rank 0 on box never reported its exit" in run.failure["reason"]


def test_a_port_that_is_taken_is_no_failure_of_the_run(ended):
    run, code = ended["port"]
    assert code == 1
    assert "port taken\n" in run.stdout
    assert not run.run_dir.failure.exists()


def test_the_same_message_after_the_first_step_is_one(ended):
    run, code = ended["late port"]
    assert code == 1
    assert run.failure["rank"] == 0


def test_an_earlier_attempt_in_the_same_directory_is_forgotten(ended):
    run, _ = ended["job_error"]
    assert run.run_dir.failure.exists()
    remove_previous_result(run.run_dir)
    assert not run.run_dir.failure.exists()
    assert not run.run_dir.result.exists()
    assert list(run.run_dir.logs.glob("failure*")) == []


class TestPreparation:
    def test_runs_in_order_before_the_ranks(self, supervise):
        python = (sys.executable, "-c")
        commands = tuple(Command(argv=(*python, f"print('built {name}')")) for name in "ab")
        run = supervise("some_steps", build_commands=commands)
        assert run.end() == 0, run.text
        lines = run.stdout.splitlines()
        assert lines[:2] == ["box:prepare | built a", "box:prepare | built b"]
        assert "built a" in run.run_dir.log_of("box", "agent").read_text()

    def test_its_failure_is_the_runs(self, supervise):
        bad = Command(argv=(sys.executable, "-c", "print('no compiler'); raise SystemExit(9)"))
        run = supervise("some_steps", build_commands=(bad,))
        assert run.end() == 9
        assert run.failure["rank"] is None
        assert "no compiler" in run.failure["traceback"]
        assert not run.run_dir.log_of("box", 0).exists()


class TestSidecars:
    def test_receives_the_exit_code_and_may_finish(self, supervise, tmp_path):
        sent = str(tmp_path / "sent")
        code = f"import sys, time; said = sys.stdin.read(); time.sleep(1); open({sent!r}, 'w').write(said)"
        run = supervise({0: "work", 1: "wait_a_moment exit_3"}, sidecars=(Command(argv=(sys.executable, "-c", code)),))
        assert run.end() == 3
        assert json.loads((tmp_path / "sent").read_text()) == {"exit_code": 3}

    def test_its_failure_changes_nothing(self, supervise):
        bad = Command(argv=(sys.executable, "-c", "raise SystemExit(5)"))
        run = supervise("some_steps", sidecars=(bad, Command(argv=("/no/such/program",))))
        assert run.end() == 0
        assert "ended with exit code 5; this does not change the run" in run.stdout
        assert "program cannot be started (No such file or directory); the run continues" in run.stdout
