"""What a machine must have for hosts made of namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess

_PROGRAMS = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "nft": "nftables",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
_TRIAL = "ip link add br0 type bridge && nft add table inet lab && mount -t tmpfs none /run && mount -t sysfs none /sys"


def missing() -> str | None:
    """Return why this machine cannot have hosts made of namespaces, or None where it can."""
    if os.geteuid() != 0:
        return "hosts made of namespaces need root"
    folders = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    packages = {package for program, package in _PROGRAMS.items() if shutil.which(program, path=folders) is None}
    if packages:
        return f"hosts made of namespaces need packages that are not installed: {', '.join(sorted(packages))}"
    namespaces = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
    trial = subprocess.run(
        ["unshare", *namespaces, "sh", "-c", _TRIAL],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if trial.returncode != 0:
        return f"this machine does not let us make namespaces: {trial.stderr.strip()}"
    return None
