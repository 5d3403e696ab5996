"""What every backend keeps: hosts, plans, submissions, and two runs, one of which fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from launcher.backends.registry import executor_of
from launcher.config.compose import compose
from launcher.config.run import Run
from launcher.errors import ConfigErrors
from launcher.planning.planner import LocalFacts, make_plan
from launcher.protocol.plan import Host, Plan, RunIdentity, plan_from_json
from launcher.protocol.results import read_metrics
from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_json
from launcher.utils.schema import to_tree

Ended = tuple[int, str, RunDir]
"""Exit code, what was printed, and where the session wrote."""

SMALL = (
    *("backend.threads=1", "tracker=local", "data=synthetic", "job.log_every=1", "job.eval_every=0", "job.steps=6"),
    *(
        "model.num_hidden_layers=1",
        "model.hidden_size=32",
        "model.max_position_embeddings=32",
        "job.sequence_length=16",
        "job.micro_batch=2",
    ),
    *("job.global_batch=4", "job.eval_sequences=4", "job.sample_tokens=0", "schedule.warmup_steps=2"),
)
SECRETS = {"HF_TOKEN": "hf_hunter2hunter2", "WANDB_API_KEY": "0123456789" * 4}


def train(run_dir: Path, *words: str) -> Ended:
    """Train with ``SMALL`` and more overrides in a process of its own."""
    command = [sys.executable, "-m", "launcher", *SMALL, *words, f"run.dir={run_dir}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=run_dir.parent, timeout=600)
    return ended.returncode, ended.stdout + ended.stderr, RunDir(run_dir)


def losses(run_dir: RunDir) -> dict[int, float]:
    """Return the training loss of each step."""
    lines = read_metrics(run_dir.metrics)
    return {int(line["train/step"]): line["train/loss"] for line in lines if "train/loss" in line}


def wait_until_empty(look: Callable[[], object], *, seconds: float) -> None:
    """Wait until ``look`` finds nothing; fail, and show what is left, when it still does."""
    deadline = time.monotonic() + seconds
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, left


class BackendContract:
    """Checks of one backend; a subclass gives ``words``; ``run``, ``left`` if they differ."""

    takes_part: ClassVar[tuple[str, ...] | None] = None
    """What the submission says of who takes part, where it is not the name of every host."""

    gone_within_s: ClassVar[float] = 15
    """How long after a run something of it may be left elsewhere."""

    @pytest.fixture
    def words(self) -> tuple[str, ...]:
        """Return overrides that choose this backend, with two ranks."""
        raise NotImplementedError

    @pytest.fixture
    def run(self, words: tuple[str, ...], tmp_path: Path) -> Callable[..., Ended]:
        """Return a function that runs to the end with more overrides."""
        return lambda *more: train(tmp_path / "run", *words, *more)

    @pytest.fixture
    def failing_run(self, run: Callable[..., Ended]) -> Callable[..., Ended]:
        """Return ``run``, or a faster way to start a run that fails."""
        return run

    @pytest.fixture
    def left(self) -> Callable[[], object]:
        """Return a function that returns what is left of runs on other machines."""
        return list

    def check_syntax(self, submission: str) -> None:
        """Fail if a submission cannot be parsed: by a shell, unless a subclass overrides it."""
        subprocess.run(["/bin/sh", "-n"], input=submission, text=True, check=True, timeout=20)

    @pytest.fixture
    def losses_of_one_machine(self, tmp_path: Path) -> dict[int, float]:
        """Return the losses of two ranks on this machine."""
        code, output, run_dir = train(tmp_path / "near", "backend=local", "backend.ranks=2")
        assert code == 0, output
        return losses(run_dir)

    @pytest.fixture
    def configured(self, words: tuple[str, ...]) -> Run:
        """Return the typed configuration of a small run."""
        return compose((*SMALL, *words)).run

    @pytest.fixture
    def hosts(self, configured: Run) -> tuple[Host, ...]:
        """Return who takes part."""
        return configured.backend.hosts(max_ranks=configured.parallel.max_ranks)

    @pytest.fixture
    def plan(self, configured: Run, hosts: tuple[Host, ...]) -> Plan:
        """Return the plan of that run, made by a user who has secrets."""
        identity = RunIdentity(run_id="20260101-120000-abcd", run_dir="/runs/x", run_hash="ab" * 32, port=29500)
        facts = LocalFacts(
            environ={"NCCL_DEBUG": "INFO", **SECRETS}, home=Path("/home/me"), ops_folder="/ops", missing_ops=()
        )
        return make_plan(configured, hosts, identity, facts)

    def test_hosts_have_different_names_and_take_every_rank(self, hosts: tuple[Host, ...], plan: Plan) -> None:
        """Hosts and the plan agree on where ranks go."""
        assert len({host.name for host in hosts}) == len(hosts)
        assert all(host.slots >= 1 for host in hosts)
        assert sum(host.slots for host in hosts) == plan.world_size == len(plan.ranks) == 2
        assert [place.host for place in plan.ranks] == [host.name for host in hosts for _ in range(host.slots)]

    def test_a_plan_comes_back_from_json_and_holds_no_secret(self, plan: Plan) -> None:
        """``plan.json`` gives the plan back."""
        text = json.dumps(to_tree(plan))
        assert plan_from_json(json.loads(text)) == plan
        assert not [name for name, value in SECRETS.items() if value in text]

    def test_the_submission_is_readable_complete_and_without_secrets(self, configured: Run, plan: Plan) -> None:
        """What is submitted names every host, and its reader can parse it."""
        executor = executor_of(configured)
        text = executor.render(plan, snapshot="job:\n  kind: train\n")
        assert text == executor.render(plan, snapshot="job:\n  kind: train\n")
        expected = [host.host.name for host in plan.hosts] if self.takes_part is None else self.takes_part
        assert [word for word in expected if word not in text] == []
        assert not [name for name, value in SECRETS.items() if value in text]
        self.check_syntax(text)

    def test_what_hosts_get_is_of_this_environment_and_not_of_another_launcher(self, configured: Run) -> None:
        """Variables of torchrun's and this launcher's own ranks stay here."""
        environ = {**SECRETS, "NCCL_DEBUG": "INFO", "PET_NNODES": "7", "RANK": "3", "LAUNCHER_X": "1"}
        forwarded = configured.backend.forwards(environ)
        assert isinstance(forwarded, tuple)
        assert len(set(forwarded)) == len(forwarded)
        assert set(forwarded) <= {*SECRETS, "NCCL_DEBUG"}

    def test_the_plan_knows_how_long_silence_may_last(self, configured: Run, plan: Plan) -> None:
        """The session takes the limit from the plan."""
        assert isinstance(configured.backend.heartbeat_timeout_s, float)
        assert plan.heartbeat_timeout_s == configured.backend.heartbeat_timeout_s >= 0

    @pytest.mark.parametrize(
        "word", ["backend.nonsense=1", "backend.port=often", "backend.restarts=-1", "backend.ranks=0"]
    )
    def test_an_option_that_is_wrong_is_refused_by_name(self, words: tuple[str, ...], word: str) -> None:
        """The error names the option as the user types it."""
        with pytest.raises(ConfigErrors) as caught:
            compose((*words, word))
        (error,) = caught.value.errors
        assert error.option == word.partition("=")[0]

    def test_a_run_completes_with_the_losses_of_one_machine(
        self, run: Callable[..., Ended], left: Callable[[], object], losses_of_one_machine: dict[int, float]
    ) -> None:
        """Where ranks are changes no loss, and nothing stays behind."""
        code, output, run_dir = run()
        assert code == 0, output
        assert read_json(run_dir.result)["status"] == "completed"
        assert losses(run_dir) == pytest.approx(losses_of_one_machine, rel=1e-6)
        ranks = read_json(run_dir.plan)["ranks"]
        assert len(ranks) == 2
        assert all(run_dir.log_of(place["host"], place["rank"]).is_file() for place in ranks)
        assert read_json(run_dir.session)["backend"]
        assert [json.loads(line)["what"] for line in run_dir.timeline.read_text().splitlines()]
        wait_until_empty(left, seconds=self.gone_within_s)

    def test_a_run_that_fails_ends_with_its_code_and_names_the_rank(
        self, failing_run: Callable[..., Ended], left: Callable[[], object]
    ) -> None:
        """``failure.json`` and the exit code are those of the rank."""
        code, output, run_dir = failing_run("job.steps=50", "optimizer.lr=1e30", "schedule=constant")
        assert code == 1, output
        failure = read_json(run_dir.failure)
        assert failure["exit_code"] == 1, output
        assert failure["rank"] in (0, 1)
        assert "loss is" in failure["reason"]
        assert f"exit code 1: rank {failure['rank']} " in output.splitlines()[-1]
        assert read_json(run_dir.result)["exit_code"] == 1
        wait_until_empty(left, seconds=self.gone_within_s)
