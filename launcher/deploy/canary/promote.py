"""Promote a new version step by step, roll it back, and show how it does.

All state is kept with the weights, so a promotion that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.config.deploy.canary import CanaryDeploy
from launcher.config.deploy.kubernetes import KubernetesDeploy
from launcher.config.deploy.proxy import ProxyDeploy
from launcher.config.run import Run
from launcher.deploy.canary.gates import Check, check_gates
from launcher.deploy.canary.progress import Progress, next_progress
from launcher.deploy.canary.prometheus import Prometheus
from launcher.deploy.canary.proxies import proxy_split
from launcher.deploy.canary.routes import RouteSplit
from launcher.deploy.canary.split import Split
from launcher.deploy.cluster import load_rendered, open_deployment
from launcher.errors import EXIT_STALLED, ConfigError, EnvironmentProblem
from launcher.utils.text import format_table

Say = Callable[[str], object]
EXIT_ROLLED_BACK = 1
"""A gate failed, and all requests go to the baseline again."""
_TRIES, _BETWEEN_S = 5, 3.0
"""For the write that takes requests from a bad version."""


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A rendered folder with a new version and a baseline."""

    folder: Path
    run: Run
    options: CanaryDeploy
    split: Split

    @property
    def names(self) -> tuple[str, str]:
        """Names of the baseline and of the new version."""
        return self.options.version_names

    def prometheus(self) -> Prometheus:
        """Return the Prometheus that gates are read from.

        Raises:
            ConfigError: the options name none.
        """
        address = self.options.gate_prometheus
        if address is None:
            why = "gates are read from Prometheus"
            fix = "render it again with deploy.canary_prometheus=http://localhost:9090"
            raise ConfigError("deploy.canary_prometheus", why=why, fix=fix)
        is_own = self.options.canary_prometheus is not None
        return Prometheus(address, option=f"deploy.{'canary_prometheus' if is_own else 'prometheus'}")

    def check(self, prometheus: Prometheus, *, since: float) -> Check:
        """Look at the new version.

        Args:
            prometheus: to ask.
            since: when it got its share, in seconds since 1970.
        """
        options, least = self.options, self.options.canary_min_requests
        window_s = max(options.canary_interval_s, min(_now() - since, options.canary_deadline_s))
        try:
            problem = self.split.problem()
            if problem is not None:
                return Check(num_requests=0, min_requests=least, problem=problem)
            return check_gates(
                self.run,
                prometheus.value,
                canary=self.split.canary_matchers,
                baseline=self.split.baseline_matchers,
                window_s=window_s,
                min_requests=least,
            )
        except EnvironmentProblem as error:
            return Check(num_requests=0, min_requests=least, unanswered=str(error))


def open_canary(folder: Path) -> Canary:
    """Return the canary of a folder.

    Raises:
        ConfigError: the folder has none.
    """
    run = load_rendered(folder)
    options = run.deploy
    if not isinstance(options, CanaryDeploy):
        why = f"holds deploy={options.kind}, which has no canary"
        fix = "name a folder of deploy=kubernetes, nginx or haproxy"
        raise ConfigError("DIR", folder, why=why, fix=fix)
    if not options.has_canary:
        why = "was rendered without a canary"
        raise ConfigError("DIR", folder, why=why, fix=f"render the new version with {options.canary_option}")
    if isinstance(options, KubernetesDeploy):
        split: Split = RouteSplit(deployment=open_deployment(folder))
    else:
        assert isinstance(options, ProxyDeploy), options.kind
        split = proxy_split(folder, run)
    return Canary(folder=folder, run=run, options=options, split=split)


def promote(canary: Canary, say: Say) -> int:
    """Raise the share of the new version step by step; go back when a gate fails.

    Args:
        canary: to promote.
        say: prints a line.

    Returns:
        The exit code: 0 once it gets all requests, 1 after a failed gate, 124 when nothing could be judged in time.

    Raises:
        ConfigError: no Prometheus is named.
        EnvironmentProblem: the weights or Prometheus cannot be reached, or the new version cannot serve, before
            anything was changed; or another program or user changed the weights.
    """
    prometheus, split, options = canary.prometheus(), canary.split, canary.options
    _, name = canary.names
    split.check_files()
    live = split.read()
    if live.percent == 100 and (live.progress is None or live.progress.state == "promoted"):
        say(f"{name} gets all requests already")
        return 0
    if live.percent == 0:  # otherwise the first check says it, and may take the requests back
        prometheus.value("vector(1)")
        if problem := split.problem():
            raise EnvironmentProblem(f"{problem}; nothing was changed")
    progress = live.progress
    if progress is None or progress.state != "progressing" or progress.percent != live.percent:
        now = _now()
        first = live.percent or options.canary_steps[0]
        progress = Progress(version=split.version, percent=first, since=now, judged=now)
        split.write(progress)
        say(_line(f"{name} gets {first} % of the requests"))
    else:
        split.write(progress)
        say(_line(f"{name} gets {live.percent} % of the requests; {_counts(progress, options)}"))
    while True:
        due = max(progress.since, progress.judged) + options.canary_interval_s
        _wait(max(0.0, due - _now()) or options.canary_interval_s)
        check = canary.check(prometheus, since=progress.since)
        following = next_progress(progress, check, options, now=_now())
        say(_line(f"{name} at {progress.percent} %: {_verdict(check, following, options)}"))
        if following.state == "rolled_back":
            return _roll_back(canary, following, say)
        if following != progress:
            split.write(following)
        if following.state == "promoted":
            say(_line(f"{name} is promoted: it gets all requests"))
            return 0
        if following.percent != progress.percent:
            say(_line(f"{name} gets {following.percent} % of the requests"))
        progress = following


def _roll_back(canary: Canary, progress: Progress, say: Say) -> int:
    """Give all requests to the baseline, if need be by several tries."""
    baseline, name = canary.names
    for left in reversed(range(_TRIES)):
        try:
            canary.split.write(progress)
            break
        except EnvironmentProblem as error:
            if not left:
                raise EnvironmentProblem(f"{name} failed its gates and still gets requests: {error}") from error
            say(_line(f"not rolled back yet: {error}"))
            _wait(_BETWEEN_S)
            with contextlib.suppress(EnvironmentProblem):
                canary.split.read()  # another program or user may have changed it
    say(_line(f"rolled back: {baseline} gets all requests. {progress.why}"))
    return EXIT_ROLLED_BACK if progress.failed >= canary.options.canary_failure_limit else EXIT_STALLED


def rollback(canary: Canary, say: Say) -> int:
    """Give all requests to the baseline, whatever the gates say.

    Raises:
        EnvironmentProblem: the weights cannot be reached.
    """
    baseline, name = canary.names
    live, now = canary.split.read(), _now()
    progress = live.progress or Progress(version=canary.split.version, percent=0, since=now, judged=now)
    if live.percent == 0 and progress.state == "rolled_back":
        say(f"{baseline} gets all requests already")
        return 0
    ended = replace(progress, percent=0, since=now, passed=0, state="rolled_back", why="launch deploy rollback")
    canary.split.write(ended)
    say(f"rolled back from {live.percent} %: {baseline} gets all requests, {name} none")
    return 0


def status(canary: Canary) -> Iterator[str]:
    """Yield the lines that show weights, progress and gates.

    Raises:
        EnvironmentProblem: the weights cannot be reached.
    """
    baseline, name = canary.names
    live = canary.split.read()
    yield f"{name} gets {live.percent} % of the requests, {baseline} {100 - live.percent} %"
    progress, since = live.progress, _now()
    if progress is not None:
        is_running = progress.state == "progressing"
        since = progress.since if is_running else since
        yield _counts(progress, canary.options) if is_running else f"{progress.state.replace('_', ' ')}: {progress.why}"
    if canary.options.gate_prometheus is None:
        yield "gates: deploy.canary_prometheus names no Prometheus"
        return
    check = canary.check(canary.prometheus(), since=since)
    if not check.results:
        yield f"gates: not judged, {check.why}"
        return
    rows = [
        ("failed" if each.has_failed else "passed" if each.is_judged else "not judged", str(each))
        for each in check.results
    ]
    yield f"gates over {check.num_requests:.0f} requests:"
    yield from format_table(rows, indent="  ")


def _counts(progress: Progress, options: CanaryDeploy) -> str:
    return (
        f"{progress.passed} of {options.canary_checks} checks passed at this step, "
        f"{progress.failed} of {options.canary_failure_limit} failed"
    )


def _verdict(check: Check, following: Progress, options: CanaryDeploy) -> str:
    """Say what a check found."""
    if not check.is_judged:
        return f"not judged: {check.why}"
    if check.has_failed:
        return f"failed {following.failed} of {options.canary_failure_limit}: {check.why}"
    judged = ", ".join(str(each) for each in check.results if each.is_judged)
    return f"passed over {check.num_requests:.0f} requests: {judged}"


def _line(text: str) -> str:
    return f"{time.strftime('%H:%M:%S')} {text}"


def _now() -> float:
    return time.time()


def _wait(seconds: float) -> None:
    time.sleep(seconds)
