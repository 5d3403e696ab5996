"""Why a probe returned no facts, from what ssh, the login shell or Python printed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.doctor.report import Finding, error
from launcher.protocol.plan import Host


@dataclass(frozen=True, kw_only=True)
class _Sign:
    """Output of a program, and its meaning."""

    pattern: str
    what: str
    remedy: str


_SIGNS: Sequence[_Sign] = (
    _Sign(
        pattern=r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        what="its host key has changed: the machine was reinstalled, or this is another one",
        remedy="if that is expected: ssh-keygen -R {bare}, then ssh {login} once",
    ),
    _Sign(
        pattern=r"Host key verification failed|No \S+ host key is known for",
        what="its host key is unknown",
        remedy="ssh {login} once by hand and accept the key, or add it with ssh-keyscan",
    ),
    _Sign(
        pattern=r"Permission denied \(|Too many authentication failures|Load key .*(denied|invalid)",
        what="rejects the ssh key",
        remedy="ssh-copy-id {login}, or name the right key in ~/.ssh/config (IdentityFile); ssh -v {login} shows more",
    ),
    _Sign(
        pattern=r"Could not resolve hostname|Name or service not known|Temporary failure in name resolution",
        what="has a name that does not resolve",
        remedy="correct the name in the hostfile, or give it an address in ~/.ssh/config (HostName)",
    ),
    _Sign(
        pattern=r"connect to .*Connection refused",
        what="is up, but nothing listens on its ssh port",
        remedy="start sshd there, or give the right port in the hostfile ({bare}:PORT)",
    ),
    _Sign(
        pattern=r"No route to host|Network is unreachable",
        what="cannot be reached: no route leads there",
        remedy="check whether it is switched on and in this network (ip route get ADDRESS)",
    ),
    _Sign(
        pattern=r"Connection timed out|Operation timed out|timed out during banner|timed out waiting for",
        what="does not answer",
        remedy="check whether it is switched on, and whether a firewall drops ssh",
    ),
    _Sign(
        pattern=r"kex_exchange_identification|Connection (closed|reset) by|banner exchange",
        what="accepts the connection and drops it before anyone can log in",
        remedy="see sshd's log there: too many logins at once (MaxStartups), a ban, or a full disk",
    ),
    _Sign(
        pattern=r"Bad configuration option|Bad owner or permissions on|terminating, \d+ bad configuration",
        what="is not tried: ssh rejects its configuration",
        remedy="correct ~/.ssh/config; ssh -G {login} shows the error",
    ),
    _Sign(
        pattern=r"No module named '?launcher\.doctor",
        what="has another version of launcher ({python})",
        remedy="install the version of this machine there, or set backend.code=sent",
    ),
    _Sign(
        pattern=r"No module named '?launcher\b",
        what="has no launcher installed for {python}",
        remedy="install it there (scripts/install), set backend.code=sent, or name another backend.python",
    ),
    _Sign(
        pattern=r"No module named '?(?P<said>[\w.]+)",
        what="lacks the package {said} for {python}",
        remedy="install it there, or name another interpreter with backend.python",
    ),
    _Sign(
        pattern=r"^srun: (?:fatal|error): (?P<said>.+)",
        what="cannot be reached by srun: {said}",
        remedy="examine nodes from inside an allocation: salloc --nodes=N launch doctor backend=slurm",
    ),
    _Sign(
        pattern=r"^launcher: (?!cannot enter)(?P<said>.+)",
        what="{said}",
        remedy="correct that on the host, or name another interpreter with backend.python",
    ),
    _Sign(
        pattern=r"No space left on device|Disk quota exceeded",
        what="has a full disk",
        remedy="free space there (df -h), at least in the home directory",
    ),
)

_NOT_FOUND = _Sign(
    pattern=r"Command not found\.$",  # csh exits 1
    what="has no {python}",
    remedy="install the environment there at the same path, or name an interpreter with backend.python",
)
_NOT_EXECUTABLE = _Sign(
    pattern=r"Exec format error",
    what="cannot run {python}",
    remedy="name an interpreter of this host's architecture that the login may run, with backend.python",
)
_BY_EXIT_CODE = {126: _NOT_EXECUTABLE, 127: _NOT_FOUND}
"""Exit codes of every shell but csh."""


def explain_probe_failure(
    host: Host, stderr_tail: str, *, exit_code: int | None, has_started: bool, waited_s: float
) -> Finding:
    """Return why the probe of ``host`` sent no facts.

    Args:
        host: as it was listed.
        stderr_tail: the end of its command's stderr.
        exit_code: of the command; ``None`` when it did not exit.
        has_started: whether the probe was running there.
        waited_s: time it had.
    """
    login = host.ssh_destination or host.name
    words = {"login": login, "bare": host.name, "python": host.python}
    by_code = _BY_EXIT_CODE.get(exit_code or 0)
    if by_code is not None:
        return error(host.name, by_code.what.format(**words), by_code.remedy.format(**words))
    for sign in (*_SIGNS, _NOT_FOUND, _NOT_EXECUTABLE):
        if found := re.search(sign.pattern, stderr_tail, re.MULTILINE):
            words |= {name: text.strip() for name, text in found.groupdict().items()}
            return error(host.name, sign.what.format(**words), sign.remedy.format(**words))
    if exit_code is None and has_started:
        what = f"answers, but its probe sent no facts within {waited_s:.1f} s"
        return error(host.name, what, "check whether `df` or `nvidia-smi` hangs there: a file system or a GPU is stuck")
    if exit_code is None:
        what = f"does not answer within {waited_s:.1f} s"
        return error(host.name, what, f"check whether it is switched on and reachable: ssh -v {login} true")
    last = (stderr_tail.strip().splitlines() or ["no output"])[-1]
    return error(
        host.name, f"its probe ended with exit code {exit_code}: {last[:300]}", f"try by hand: ssh {login} true"
    )
