"""Rules: pure functions that yield findings about hosts and the network between them."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from launcher.config.run import Run
from launcher.doctor.protocol import PACKAGES, Contact, GroupMeasurement, HostFacts, PairMeasurement, PluginFacts
from launcher.doctor.report import Finding, error, warning
from launcher.errors import ConfigError
from launcher.protocol.plan import Host
from launcher.utils.text import bytes_text, counted

CLOCK_SKEW_S = 2.0
"""Beyond this, logs and timelines of several hosts cannot be compared."""
LITTLE_MEMORY_BYTES = 2**30
"""Free RAM per rank; Python with torch takes a third of it."""
LITTLE_DISK_BYTES = 10 * 2**30
"""Size of a few checkpoints of a small model."""
NO_DISK_BYTES = 256 * 2**20
"""Below this, logs, metrics and a checkpoint do not fit."""
LITTLE_SHM_BYTES = 2**30
"""Containers have 64 MiB of /dev/shm by default, which NCCL and data loaders exceed."""
HIGH_LATENCY_S = 0.005
"""A round trip within a building takes less than a millisecond."""
DISTANT_S = 0.05
"""Latency of a link on which all-reduces are unusable.
To measure them would take longer than all other checks."""
LOW_BYTES_PER_S = 50 * 2**20
"""Less than half the bandwidth of gigabit Ethernet."""
ODD_SHARE = 0.25
"""A pair with less than this share of the median bandwidth is reported."""
_SENDS = "backend=ssh sends the package with backend.code=sent"
_SHOWN = 3
"""Maximum number of host names in one sentence."""
_Facts = Mapping[str, HostFacts]


def host_rules(
    hosts: Sequence[Host],
    facts: _Facts,
    *,
    skews_s: Mapping[str, float],
    code_hash: str,
    plugins: Sequence[PluginFacts] = (),
) -> Iterator[Finding]:
    """Yield findings about each host alone and about differences between their facts.

    Args:
        hosts: in the order of the hostfile.
        facts: of those that answered, by name, in the order of hosts.
        skews_s: seconds by which each clock is ahead of the launching machine's.
        code_hash: of this package on the launching machine.
        plugins: of the run, on the launching machine.
    """
    answered = [host for host in hosts if host.name in facts]
    yield from _differing_software(facts)
    yield from _differing_code(facts, code_hash)
    yield from _differing_plugins(facts, plugins)
    yield from _duplicates(facts)
    for host in answered:
        found = facts[host.name]
        yield from _clock(host, skews_s[host.name])
        yield from _slots(host, found)
        yield from _run_dir(host, found)
        yield from _room(host, found)
    yield from _shared_run_dir(facts)
    yield from _mixed_devices(facts)


def _differing_software(facts: _Facts) -> Iterator[Finding]:
    """Yield hosts that differ from the majority: errors in the first two version numbers."""
    yield from _different_hosts(facts, "architecture", lambda found: found.architecture, "leave it out of the hostfile")
    yield from _different_hosts(
        facts,
        "python",
        lambda found: found.software.python,
        "install the same versions everywhere, or name another interpreter with backend.python",
    )
    for name in PACKAGES:
        for host, found in facts.items():
            if name not in found.software.packages:
                remedy = f"install it for {found.software.python_path} (scripts/install)"
                yield error(host, f"{name} is not installed", remedy)
        yield from _different_package(facts, name)
    install = "install the same build of torch everywhere"
    yield from _different_hosts(facts, "torch's CUDA", lambda found: found.software.cuda or "none", install)
    yield from _different_hosts(facts, "NCCL", lambda found: found.software.nccl or "none", install)
    drivers = {host: found for host, found in facts.items() if found.software.driver}
    for finding in _different_hosts(
        drivers, "NVIDIA driver", lambda found: found.software.driver or "", "update the driver"
    ):
        yield warning(finding.host, finding.what, finding.remedy)


def _different_package(facts: _Facts, name: str) -> Iterator[Finding]:
    having = {host: found for host, found in facts.items() if name in found.software.packages}
    yield from _different_hosts(
        having, name, lambda found: found.software.packages[name], f"install the same {name} everywhere"
    )


def _different_hosts(facts: _Facts, what: str, value: Callable[[HostFacts], str], remedy: str) -> Iterator[Finding]:
    values = {host: value(found) for host, found in facts.items()}
    if len(set(values.values())) < 2:
        return
    usual = Counter(values.values()).most_common(1)[0][0]  # the first of equally common ones
    example = next(host for host, found in values.items() if found == usual)
    others = f"{example} has" if len(values) == 2 else "most have"
    for host, found in values.items():
        if found != usual:
            level = warning if _minor(found) == _minor(usual) else error
            yield level(host, f"{what} is {found} and {others} {usual}", remedy)


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def _differing_code(facts: _Facts, code_hash: str) -> Iterator[Finding]:
    for host, found in facts.items():
        if found.software.code_hash != code_hash:
            what = f"its launcher code is {found.software.code_hash[:12]} and this machine's is {code_hash[:12]}"
            yield error(host, what, "install the same version there, or set backend.code=sent")


def _differing_plugins(facts: _Facts, plugins: Sequence[PluginFacts]) -> Iterator[Finding]:
    """Yield plugins of the run that a host cannot load, or of which it has other code."""
    here = {plugin.module: plugin for plugin in plugins}
    for host, found in facts.items():
        for plugin in found.software.plugins:
            own = here.get(plugin.module)
            if plugin.problem is not None:
                by = found.software.python_path
                what = f"the plugin {plugin.module}, which the run uses, cannot be loaded by {by}: {plugin.problem}"
                yield error(host, what, f"install its package there, with what it imports; {_SENDS}")
            elif own is not None and plugin.code_hash != own.code_hash:
                what = (
                    f"its plugin {plugin.module} is {_version_text(plugin)} and this machine's is {_version_text(own)}"
                )
                yield error(host, what, f"install the same version there; {_SENDS}")


def _version_text(plugin: PluginFacts) -> str:
    return f"{plugin.version} {plugin.code_hash[:12]} ({plugin.file})".lstrip()


def _duplicates(facts: _Facts) -> Iterator[Finding]:
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
        what = f"has {counted(host.slots, 'rank')} and shows {counted(len(found.devices), 'GPU')}"
        yield error(host.name, what, _fewer(host, len(found.devices)))
    elif beyond:
        what = f"shows {counted(len(found.devices), 'GPU')}, and the filter chooses slot {', '.join(beyond)}"
        yield error(host.name, what, f"choose from 0 to {len(found.devices) - 1}, counted among the visible GPUs")
    elif not found.devices and host.slots > found.cores:
        what = f"is given {counted(host.slots, 'rank')} and has {counted(found.cores, 'core')}"
        yield warning(host.name, what, _fewer(host, found.cores))


def _fewer(host: Host, slots: int) -> str:
    """Return how to give a host fewer ranks: in the hostfile, or by the option without one."""
    return f"write slots={slots} in the hostfile" if host.ssh_destination else f"set backend.ranks={slots}"


def _run_dir(host: Host, found: HostFacts) -> Iterator[Finding]:
    disk = found.storage
    if disk.problem is not None:
        what = f"nothing can be written to the run directory: {disk.folder}: {disk.problem}"
        remedy = "set run.root to a folder that this login may write to on every host"
        if disk.problem in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)):
            remedy = "free space there, or set run.root to another disk"
        yield error(host.name, what, remedy)
    elif disk.free_bytes < NO_DISK_BYTES:
        what = f"the disk of the run directory is full: {bytes_text(disk.free_bytes)} left for {disk.folder}"
        yield error(host.name, what, "free space, or set run.root to another disk")
    elif disk.free_bytes < LITTLE_DISK_BYTES:
        what = f"little disk is left for the run directory: {bytes_text(disk.free_bytes)} for {disk.folder}"
        yield warning(host.name, what, "free space, or set run.root to another disk")


def _room(host: Host, found: HostFacts) -> Iterator[Finding]:
    if found.free_memory_bytes < LITTLE_MEMORY_BYTES * host.slots:
        what = f"little memory is free: {bytes_text(found.free_memory_bytes)} for {counted(host.slots, 'rank')}"
        yield warning(host.name, what, "stop other processes there, or give it fewer slots")
    disk = found.storage
    if disk.shm_free_bytes < LITTLE_SHM_BYTES:
        free, size = bytes_text(disk.shm_free_bytes), bytes_text(disk.shm_bytes)
        what = f"little shared memory is left: {free} of {size} in /dev/shm"
        remedy = (
            "remove what crashed programs left there, or make it larger (containers: --shm-size, emptyDir in memory)"
        )
        yield warning(host.name, what, remedy)


def _shared_run_dir(facts: _Facts) -> Iterator[Finding]:
    apart = [host for host, found in facts.items() if not found.storage.is_shared and found.storage.problem is None]
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
                remedy = (
                    "check whether nvidia-smi works there and CUDA_VISIBLE_DEVICES hides them, or leave the host out"
                )
                yield error(host, what, remedy)


def port_rules(first: str, *, port: int | None, problem: str) -> Iterator[Finding]:
    """Yield that the first host cannot open the rendezvous port; ``None`` means any port."""
    if port is None:
        yield error(first, f"no port can be opened for the rendezvous: {problem}", "check why no port is free there")
        return
    what = f"port {port} cannot be opened for the rendezvous: {problem}"
    yield error(first, what, "set backend.port=auto, or stop the process that uses it")


def contact_rules(contacts: Mapping[str, Contact], *, port: int) -> Iterator[Finding]:
    """Yield hosts that cannot reach the rendezvous, or reach it slowly.

    Args:
        contacts: by host; the rendezvous is on the first one.
        port: of the rendezvous.
    """
    first, *others = contacts
    unreached = [host for host in others if contacts[host].problem is not None]
    slow = [host for host in others if (contacts[host].latency_s or 0.0) > HIGH_LATENCY_S]
    yield from _unreached(first, unreached, contacts, port, are_all=len(unreached) == len(others) > 1)
    yield from _slow(first, slow, contacts, are_all=len(slow) == len(others) > 1)
    if contacts[first].problem is not None:
        yield error(first, f"{contacts[first].problem}", "correct the routes there: ip route get ADDRESS")
    for host, found in contacts.items():
        if others and found.local_address is not None and found.interface in (None, "lo"):
            what = f"its route to the other hosts begins at {found.local_address}, which no network interface has"
            if found.interface == "lo":
                what = f"its route to the other hosts leads to itself ({found.local_address})"
            yield error(host, what, "correct /etc/hosts or the routes there: ip route get ADDRESS")


def _unreached(
    first: str, hosts: Sequence[str], contacts: Mapping[str, Contact], port: int, *, are_all: bool
) -> Iterator[Finding]:
    remedy = f"open it in the firewall, or set backend.port to one that is open; test there: nc -vz {first} {port}"
    if are_all:
        what = f"no other host reaches its port {port}: {contacts[hosts[0]].problem}"
        yield error(first, what, remedy)
        return
    for host in hosts:
        yield error(host, f"cannot reach port {port} of {first}: {contacts[host].problem}", remedy)


def _slow(first: str, hosts: Sequence[str], contacts: Mapping[str, Contact], *, are_all: bool) -> Iterator[Finding]:
    remedy = "check whether it is on the same network, and whether the route takes a slow interface or a tunnel"
    if are_all:
        fastest = min(contacts[host].latency_s or 0.0 for host in hosts)
        yield warning(first, f"every other host needs {fastest * 1e3:.1f} ms or more for a round trip to it", remedy)
        return
    for host in hosts:
        latency = contacts[host].latency_s or 0.0
        via = f" over {contacts[host].interface}"
        yield warning(host, f"a round trip to {first} takes {latency * 1e3:.1f} ms{via}", remedy)


def pair_rules(pairs: Sequence[PairMeasurement]) -> Iterator[Finding]:
    """Yield pairs whose all-reduce fails or is slow."""
    for pair in pairs:
        if pair.problem is not None:
            what = f"an all-reduce with {pair.hosts[0]} fails: {pair.problem}"
            yield error(
                pair.hosts[1], what, "open all TCP ports between the two hosts: ranks connect on ports of any number"
            )
    measured = [pair for pair in pairs if pair.problem is None]
    speeds = [pair.bytes_per_s for pair in measured if pair.bytes_per_s is not None]
    usual = median(speeds) if len(speeds) > 2 else 0.0
    for pair in measured:
        speed, latency = pair.bytes_per_s or 0.0, pair.latency_s or 0.0
        if speed < LOW_BYTES_PER_S or speed < usual * ODD_SHARE:
            compared = f", the median of all pairs is {bytes_text(usual)}/s" if usual else ""
            what = f"an all-reduce with {pair.hosts[0]} carries {bytes_text(speed)}/s{compared}"
            yield warning(
                pair.hosts[1], what, "check link speed and cables of both (ethtool), and what else uses the network"
            )
        elif latency > HIGH_LATENCY_S:
            what = f"an all-reduce with {pair.hosts[0]} takes {latency * 1e3:.1f} ms at least"
            yield warning(pair.hosts[1], what, "check the route between the two hosts, and what else runs there")


def group_rules(group: Mapping[str, GroupMeasurement], *, silent: Mapping[str, str]) -> Iterator[Finding]:
    """Yield hosts on which an all-reduce among all fails.

    Args:
        group: measurement of each host, by name.
        silent: why other hosts measured nothing, by name.
    """
    for host, found in group.items():
        if found.problem is not None:
            yield error(host, f"an all-reduce among all hosts fails: {found.problem}", "see the message of torch there")
    for host, reason in silent.items():
        yield error(
            host, f"measured nothing: {reason}", "check whether `import torch` works there, and how long it takes"
        )


def validate_shared_run_dir(
    run: Run, hosts: Sequence[Host], facts: Mapping[str, HostFacts], *, folder: str
) -> Iterator[ConfigError]:
    """Yield errors for checkpoints and files of other ranks, spread over local disks of hosts.

    A single host holds whole checkpoints; so do hosts that share a file server this machine is not connected to.

    Args:
        run: the configuration.
        hosts: of the run.
        facts: of those that answered, by name.
        folder: the run directory.
    """
    apart = [host.name for host in hosts if host.name in facts and not facts[host.name].storage.is_shared]
    servers = {facts[host.name].storage.served_by for host in hosts if host.name in facts}
    if len(hosts) < 2 or not apart or (len(servers) == 1 and "" not in servers):
        return
    more = f" and {len(apart) - _SHOWN} more" if len(apart) > _SHOWN else ""
    why = f"not all hosts share {folder} ({', '.join(apart[:_SHOWN])}{more}), and "
    shared = "set run.root to a folder that all of them share"
    off = "checkpoint.every=0 checkpoint.at_end=false"
    policy, saves = run.checkpoint, run.job.saves
    for option, value in (("checkpoint.every", policy.every), ("checkpoint.at_end", policy.at_end or None)):
        if value and saves:
            whose = "each would keep only its own part of a checkpoint"
            yield ConfigError(option, value, why=why + whose, fix=f"{shared}, or {off}")
    if run.job.reads_other_ranks_files:
        reads = "ranks of this job read what the ranks of other hosts write there"
        yield ConfigError("job", run.job.kind, why=why + reads, fix=f"{shared}, or use one host")
    if run.backend.restarts:
        needs = f"a restart would not find {'a whole checkpoint' if saves else 'what every rank has written'}"
        yield ConfigError("backend.restarts", run.backend.restarts, why=why + needs, fix=f"{shared}, or 0")
