"""Cases once more, under the profiler: what they are made of is seen, and no figure comes from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.isolated import run_isolated
from launcher.profile import ProfiledBy, TorchProfile
from launcher.profiling.base import Profiler
from launcher.profiling.make import make_profiler

if TYPE_CHECKING:
    from launcher.context import Context


def profile_cases(function: str, cases: Mapping[str, Mapping[str, Any]], *, context: Context) -> None:
    """Call ``function`` once more for each case and record its beginning, where the run asks for that.

    Args:
        function: ``module:name``, as ``run_isolated`` takes it.
        cases: arguments by name of the case.
        context: of this rank.
    """
    profile = context.run.profile
    if not isinstance(profile, TorchProfile):
        return
    for name, arguments in cases.items():
        place = {"folder": str(context.run_dir.profile), "name": file_name(name, context)}
        beat = partial(context.heartbeat.beat, "profile")
        run_isolated(function, arguments, beat=beat, profile={"options": asdict(profile), **place})


def case_profiler(name: str, context: Context, *, by: ProfiledBy = "engine steps") -> Profiler:
    """Return what records one more pass of a case that is measured in this process."""
    return make_profiler(context.run.profile, by=by, folder=context.run_dir.profile, name=file_name(name, context))


def file_name(case: str, context: Context) -> str:
    """Return a case's name as files can have it."""
    rank = f"rank{context.rank}." if context.world_size > 1 else ""
    return rank + re.sub(r"[^\w.-]+", "_", case)
