"""The job verify on one rank: one process first, then each strategy in forks of all ranks."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.config.job.verify import SINGLE_PROCESS, SelectedStrategies, Strategy, select_strategies
from launcher.errors import JobError
from launcher.protocol.metrics import MetricsWriter
from launcher.utils.files import write_atomic, write_json
from launcher.verification.comparison import StrategyResult, as_json, as_markdown, compare, table_lines
from launcher.verification.forked_ranks import ERROR_KEY, CaseAnswer, ForkedRanks, preload_modules

if TYPE_CHECKING:
    from launcher.config.job.verify import Verify
    from launcher.engines.context import Context

_REFERENCE = "reference"


def verify(job: Verify, context: Context) -> None:
    """Take part in every case; rank 0 compares, writes and prints.

    Raises:
        JobError: on rank 0, when a strategy is not equal to one process; names the worst.
    """
    if job.check == "resume":
        from launcher.verification.resuming import verify_resume

        verify_resume(job, context)
        return
    choice = select_strategies(job, context.run, world_size=context.world_size)
    preload_modules(context, deepspeed=any(case.parallel.engine == "deepspeed" for case in choice.cases.values()))
    Verification(job, context, choice).run()


@dataclass
class Verification:
    """One rank's part."""

    job: Verify
    context: Context
    choice: SelectedStrategies

    def __post_init__(self) -> None:
        self._phase, self._done = _REFERENCE, 0
        self._ranks = ForkedRanks(
            self.context, folder="verify", limit_s=self.job.case_timeout_s, heartbeat=self._heartbeat
        )

    def run(self) -> None:
        """Take the reference on rank 0, then every case on all ranks."""
        rows: list[StrategyResult] = []
        with MetricsWriter(self.context.run_dir.metrics) if self.context.is_main else nullcontext() as writer:
            reference = self._take_reference()
            self._done += self.job.steps
            for name, case in self.choice.cases.items():
                row = self._take(name, case, reference)
                self._done += self.job.steps
                if writer is not None and row is not None:
                    rows.append(row)
                    writer.record(self.job.steps, **_metrics(row))
                    print(f"{name}: {row.why(self.job) or 'ok'} ({row.seconds:.1f} s)", flush=True)
        self._ranks.finish()
        self._phase = "done"
        self._heartbeat()
        if self.context.is_main:
            self._report(rows)

    def _take_reference(self) -> CaseAnswer:
        """Return, on rank 0, what one process does.

        Raises:
            JobError: it fails itself, so there is nothing to compare with.
        """
        answers = self._answers(_REFERENCE, SINGLE_PROCESS, world_size=1)
        if not self.context.is_main:
            return {}
        if ERROR_KEY in answers[0]:
            raise JobError(f"one process, the reference, failed: {answers[0][ERROR_KEY]}")
        return answers[0]

    def _take(self, name: str, case: Strategy, reference: CaseAnswer) -> StrategyResult | None:
        """Take part in a case; rank 0 returns its difference from the reference."""
        started = time.monotonic()
        answers = self._answers(name, case, world_size=self.context.world_size)
        if not self.context.is_main:
            return None
        return compare(name, answers, reference, seconds=time.monotonic() - started)

    def _answers(self, name: str, case: Strategy, *, world_size: int) -> dict[int, CaseAnswer]:
        self._phase = f"verify {name}"

        def work(context: Context) -> CaseAnswer:
            from launcher.verification.run_case import run_case

            return run_case(self.job, context, self._ranks.rendezvous.reference, writes=name == _REFERENCE)

        run = case.apply(self.context.run, world_size=world_size, sequences=self.choice.sequences)
        return self._ranks.run_case(name, work, run=run, world_size=world_size)

    def _heartbeat(self) -> None:
        self.context.heartbeat.update(self._phase, self._done)

    def _report(self, rows: list[StrategyResult]) -> None:
        job, folder, left_out = self.job, self.context.run_dir.path, self.choice.left_out
        write_json(folder / "verify.json", as_json(rows, job, left_out=left_out))
        write_atomic(folder / "verify.md", as_markdown(rows, job, left_out=left_out))
        print("\n".join(table_lines(rows, job)), flush=True)
        failed = [row for row in rows if row.excess(job) > 1]
        if failed:
            worst = max(failed, key=lambda row: row.excess(job))
            raise JobError(
                f"{len(failed)} of {len(rows)} strategies are not equal to one process; the worst is {worst.name}: "
                f"{worst.why(job)}; all are in {folder / 'verify.md'}"
            )
        print(f"all {len(rows)} strategies take the steps of one process: {folder / 'verify.md'}", flush=True)


def _metrics(row: StrategyResult) -> dict[str, float]:
    return {
        f"verify/{row.name}/loss_diff": row.loss_diff,
        f"verify/{row.name}/grad_norm_diff": row.grad_norm_diff,
        f"verify/{row.name}/weights_diff": row.weights_diff,
        f"verify/{row.name}/tokens_equal": float(row.tokens_equal),
    }
