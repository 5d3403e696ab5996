"""What is wrong with hosts, judged from their facts: pure functions, each yielding findings."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from launcher.doctor.facts import PACKAGES, HostFacts
from launcher.doctor.finding import Finding, error, warning
from launcher.plan import Host
from launcher.wording import bytes_text, times

CLOCK_SKEW_S = 2.0
"""Logs and timelines of several hosts cannot be read together beyond this."""
LITTLE_MEMORY_BYTES = 2**30
"""Free RAM for each rank; Python with torch alone takes a third of it."""
LITTLE_DISK_BYTES = 10 * 2**30
"""A few checkpoints of a small model."""
NO_DISK_BYTES = 256 * 2**20
"""Logs, metrics and one write of a checkpoint do not fit."""
LITTLE_SHM_BYTES = 2**30
"""Containers come with 64 MiB of /dev/shm, which NCCL and data loaders fill at once."""

_Facts = Mapping[str, HostFacts]


def rules(hosts: Sequence[Host], facts: _Facts, *, skews_s: Mapping[str, float], code_hash: str) -> Iterator[Finding]:
    """Yield everything that stands against a run on ``hosts``, as far as each can tell alone.

    Args:
        hosts: as they were listed.
        facts: of those that answered, by name, in the order of hosts.
        skews_s: how far each clock is ahead of the launching machine's.
        code_hash: of this package on the launching machine.
    """
    asked = [host for host in hosts if host.name in facts]
    yield from _differing_software(facts)
    yield from _differing_code(facts, code_hash)
    yield from _twins(facts)
    for host in asked:
        found = facts[host.name]
        yield from _clock(host, skews_s[host.name])
        yield from _slots(host, found)
        yield from _run_dir(host, found)
        yield from _room(host, found)
    yield from _shared_run_dir(facts)
    yield from _mixed_devices(facts)


def _differing_software(facts: _Facts) -> Iterator[Finding]:
    """Yield whoever deviates from most. A difference in the first two numbers breaks protocols; a later one may not."""
    yield from _odd_ones(facts, "architecture", lambda found: found.architecture, "leave it out of the hostfile")
    yield from _odd_ones(
        facts,
        "python",
        lambda found: found.software.python,
        "make the environments alike, or name another interpreter with backend.python",
    )
    for name in PACKAGES:
        for host, found in facts.items():
            if name not in found.software.packages:
                remedy = f"install it for {found.software.python_path} (scripts/install)"
                yield error(host, f"{name} is not installed", remedy)
        yield from _odd_package(facts, name)
    install = "install the same build of torch everywhere"
    yield from _odd_ones(facts, "torch's CUDA", lambda found: found.software.cuda or "none", install)
    yield from _odd_ones(facts, "NCCL", lambda found: found.software.nccl or "none", install)
    drivers = {host: found for host, found in facts.items() if found.software.driver}
    for finding in _odd_ones(drivers, "NVIDIA driver", lambda found: found.software.driver or "", "update the driver"):
        yield warning(finding.host, finding.what, finding.remedy)


def _odd_package(facts: _Facts, name: str) -> Iterator[Finding]:
    having = {host: found for host, found in facts.items() if name in found.software.packages}
    yield from _odd_ones(
        having, name, lambda found: found.software.packages[name], f"install the same {name} everywhere"
    )


def _odd_ones(facts: _Facts, what: str, value: Callable[[HostFacts], str], remedy: str) -> Iterator[Finding]:
    values = {host: value(found) for host, found in facts.items()}
    if len(set(values.values())) < 2:
        return
    usual = Counter(values.values()).most_common(1)[0][0]  # of equals, the one met first
    example = next(host for host, found in values.items() if found == usual)
    others = f"{example} has" if len(values) == 2 else "most have"
    for host, found in values.items():
        if found != usual:
            judge = warning if _minor(found) == _minor(usual) else error
            yield judge(host, f"{what} is {found} and {others} {usual}", remedy)


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def _differing_code(facts: _Facts, code_hash: str) -> Iterator[Finding]:
    for host, found in facts.items():
        if found.software.code_hash != code_hash:
            what = f"its launcher code is {found.software.code_hash[:12]} and this machine's is {code_hash[:12]}"
            yield error(host, what, "install the same version there, or set backend.code=sent")


def _twins(facts: _Facts) -> Iterator[Finding]:
    """Yield machines listed under two names: their ranks would share devices."""
    seen: dict[tuple[str, str, str], str] = {}
    for host, found in facts.items():
        first = seen.setdefault((found.boot_id, found.hostname, found.address), host)
        if first != host:
            yield error(host, f"is the same machine as {first}", "list it once, with all of its slots")


def _clock(host: Host, skew_s: float) -> Iterator[Finding]:
    if abs(skew_s) > CLOCK_SKEW_S:
        direction = "ahead of" if skew_s > 0 else "behind"
        what = f"its clock is {abs(skew_s):.1f} s {direction} this machine's"
        yield warning(host.name, what, "synchronise it (timedatectl set-ntp true): timelines are read across hosts")


def _slots(host: Host, found: HostFacts) -> Iterator[Finding]:
    beyond = [str(slot) for slot in host.slot_ids if slot >= len(found.devices) > 0]
    if found.devices and host.slots > len(found.devices):
        what = f"takes {times(host.slots, 'rank')} and shows {times(len(found.devices), 'GPU')}"
        yield error(host.name, what, f"write slots={len(found.devices)} in the hostfile")
    elif beyond:
        what = f"shows {times(len(found.devices), 'GPU')}, and the filter chooses slot {', '.join(beyond)}"
        yield error(host.name, what, f"choose from 0 to {len(found.devices) - 1}, counted among the visible GPUs")
    elif not found.devices and host.slots > found.cores:
        what = f"takes {times(host.slots, 'rank')} and has {times(found.cores, 'core')}"
        yield warning(host.name, what, f"write slots={found.cores} in the hostfile")


def _run_dir(host: Host, found: HostFacts) -> Iterator[Finding]:
    disk = found.storage
    if disk.problem is not None:
        what = f"nothing can be written to the run directory: {disk.folder}: {disk.problem}"
        remedy = "set run.root to a folder that this login may write to on every host"
        if disk.problem in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)):
            remedy = "make room there, or set run.root to another disk"
        yield error(host.name, what, remedy)
    elif disk.free_bytes < NO_DISK_BYTES:
        what = f"the disk of the run directory is full: {bytes_text(disk.free_bytes)} left for {disk.folder}"
        yield error(host.name, what, "make room, or set run.root to another disk")
    elif disk.free_bytes < LITTLE_DISK_BYTES:
        what = f"little disk is left for the run directory: {bytes_text(disk.free_bytes)} for {disk.folder}"
        yield warning(host.name, what, "make room, or set run.root to another disk")


def _room(host: Host, found: HostFacts) -> Iterator[Finding]:
    if found.free_memory_bytes < LITTLE_MEMORY_BYTES * host.slots:
        what = f"little memory is free: {bytes_text(found.free_memory_bytes)} for {times(host.slots, 'rank')}"
        yield warning(host.name, what, "end what else runs there, or give it fewer slots")
    disk = found.storage
    if disk.shm_free_bytes < LITTLE_SHM_BYTES:
        free, size = bytes_text(disk.shm_free_bytes), bytes_text(disk.shm_bytes)
        what = f"little shared memory is left: {free} of {size} in /dev/shm"
        remedy = (
            "remove what crashed programs left there, or make it larger (containers: --shm-size, emptyDir in memory)"
        )
        yield warning(host.name, what, remedy)


def _shared_run_dir(facts: _Facts) -> Iterator[Finding]:
    apart = [host for host, found in facts.items() if not found.storage.is_ours and found.storage.problem is None]
    for host in apart:
        what = f"{facts[host].storage.folder} is not the folder of that name on this machine"
        remedy = "put run.root on a file system that all hosts share: logs and metrics are sent, checkpoints stay there"
        yield warning(host, what, remedy)


def _mixed_devices(facts: _Facts) -> Iterator[Finding]:
    having = [host for host, found in facts.items() if found.devices]
    if having and len(having) < len(facts):
        for host, found in facts.items():
            if not found.devices:
                what = f"shows no GPU, and {having[0]} does"
                remedy = "see whether nvidia-smi works there and CUDA_VISIBLE_DEVICES hides them, or leave the host out"
                yield error(host, what, remedy)
