"""The progress of a canary: plain data beside the weights, and its next state."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

from launcher.config.deploy.canary import CanaryDeploy
from launcher.deploy.canary.gates import Check

State = Literal["progressing", "promoted", "rolled_back"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """State of one canary."""

    version: str
    """The new version, so that the record of another canary is not taken for this one's."""
    percent: int
    """Of the requests, that it gets."""
    since: float
    """When it got them, in seconds since 1970."""
    judged: float
    """When gates were judged last, or the step began."""
    passed: int = 0
    """Checks of this step that passed."""
    failed: int = 0
    """Checks that failed, over all steps."""
    state: State = "progressing"
    why: str = ""
    """What ended it."""

    def dump(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


def load_progress(text: str | None, *, version: str) -> Progress | None:
    """Return a dumped progress; ``None`` if it is not that of this version."""
    try:
        found = Progress(**json.loads(text or ""))
        _ = found.since + found.judged + found.percent + found.passed + found.failed
    except (TypeError, ValueError, RecursionError):
        return None
    return found if found.version == version else None


def next_progress(progress: Progress, check: Check, options: CanaryDeploy, *, now: float) -> Progress:
    """Return the state after a check.

    Args:
        progress: before it.
        check: what was seen.
        options: steps and limits.
        now: seconds since 1970.
    """
    if not check.is_judged:
        if now - progress.judged < options.canary_deadline_s:
            return progress
        why = f"nothing could be judged for deploy.canary_deadline_s={options.canary_deadline_s}: {check.why}"
        return _rolled_back(progress, why, now=now)
    if check.has_failed:
        failed = replace(progress, failed=progress.failed + 1, judged=now)
        return failed if failed.failed < options.canary_failure_limit else _rolled_back(failed, check.why, now=now)
    if progress.passed + 1 < options.canary_checks:
        return replace(progress, passed=progress.passed + 1, judged=now)
    following = [step for step in options.canary_steps if step > progress.percent]
    if not following:
        return replace(progress, passed=progress.passed + 1, judged=now, state="promoted", why="all gates passed")
    return replace(progress, percent=following[0], passed=0, since=now, judged=now)


def _rolled_back(progress: Progress, why: str, *, now: float) -> Progress:
    return replace(progress, percent=0, since=now, passed=0, state="rolled_back", why=why)
