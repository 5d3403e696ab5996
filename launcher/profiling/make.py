"""From what a run asks for to what records it."""

from __future__ import annotations

from pathlib import Path

from launcher.profile import Profile, ProfiledBy, TorchProfile
from launcher.profiling.base import NO_PROFILER, Profiler


def make_profiler(profile: Profile, *, by: ProfiledBy, folder: Path, name: str) -> Profiler:
    """Return what records this process.

    Args:
        profile: the run's.
        by: what the recording is measured in.
        folder: where its files go; made once there are any.
        name: of this process, with which its files begin (``rank0``).
    """
    if not isinstance(profile, TorchProfile) or by == "cases":
        return NO_PROFILER
    from launcher.profiling.recording import Recording
    from launcher.profiling.stretch import StretchProfiler
    from launcher.profiling.windowed import WindowProfiler

    recording = Recording(profile, folder=folder, name=name)
    if by == "time":
        return StretchProfiler(recording, seconds=profile.seconds)
    return WindowProfiler(recording, profile.window(by), what=by.removesuffix("s"))
