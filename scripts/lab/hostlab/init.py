"""The first process of a host: dresses it up as a machine of its own, starts its sshd, and reaps orphans.

    init.py LAB NAME [private-tmp]

It runs inside the new namespaces, from its own file, with the standard library only. When its stdin ends, or it is
killed, the kernel ends everything on the host.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main(lab: Path, name: str, *, has_private_tmp: bool) -> None:
    """Be the host ``name`` until stdin ends."""
    own = lab / name
    socket.sethostname(name)
    shown = {"hosts": lab, "nsswitch.conf": lab, "ssh/ssh_config": lab, "hostname": own}
    for file, folder in shown.items():
        _mount("--bind", folder / Path(file).name, Path("/etc") / file)
    _mount("-t", "tmpfs", "tmpfs", "/dev/shm")  # noqa: S108
    _mount("-t", "tmpfs", "tmpfs", "/run")
    Path("/run/sshd").mkdir(mode=0o755)  # sshd refuses to start without it
    _fresh_sys(own)
    if has_private_tmp:
        _private_tmp(lab, own / "tmp")
    subprocess.run(["/usr/sbin/sshd", "-f", own / "sshd_config", "-E", own / "sshd.log"], check=True)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what ends from now on
    _reap()
    while os.read(0, 1):
        pass


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)  # noqa: S607


def _fresh_sys(own: Path) -> None:
    """Mount a /sys that shows this host's network, with the cgroups of the old one."""
    old, kept = Path("/sys/fs/cgroup"), own / "cgroup"
    has_cgroups = old.is_mount()
    if has_cgroups:
        kept.mkdir()
        _mount("--rbind", old, kept)
    _mount("-t", "sysfs", "sysfs", "/sys")
    if has_cgroups:
        _mount("--move", kept, old)


def _private_tmp(lab: Path, tmp: Path) -> None:
    """Give this host its own /tmp, in which the lab and this repository are found should they lie in the old one."""
    tmp.mkdir(mode=0o1777)
    tmp.chmod(0o1777)
    shared = Path("/tmp")  # noqa: S108
    for kept in (lab, Path(__file__).resolve().parents[3]):
        if kept.is_relative_to(shared):
            hole = tmp / kept.relative_to(shared)
            hole.mkdir(parents=True)
            _mount("--bind", kept, hole)
    _mount("--rbind", tmp, shared)


def _reap() -> None:
    """Reap children that exited before the kernel was set to reap them."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], has_private_tmp="private-tmp" in sys.argv[3:])
