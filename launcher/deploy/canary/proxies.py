"""Weights of two groups of servers behind HAProxy or nginx on this machine.

HAProxy's are read and changed in the running process, by its runtime API. nginx cannot be asked for its weights: those
of its file count, and a reload puts them in force without breaking a connection. The progress is kept in the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.config.deploy.canary import share_of_weights
from launcher.config.deploy.haproxy import HaproxyDeploy
from launcher.config.deploy.nginx import NginxDeploy
from launcher.config.deploy.proxy import ProxyDeploy
from launcher.config.run import Run
from launcher.deploy import haproxy, nginx
from launcher.deploy.canary.progress import Progress, load_progress
from launcher.deploy.canary.split import Live, update_folder, with_share
from launcher.deploy.folder import changed_files
from launcher.deploy.proxy import CANARY_PREFIX, READINESS_PATH, Upstream, upstreams_of
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.utils.files import read_regular, sha256_of, write_atomic

PROGRESS_FILE = "canary.json"
_TIMEOUT_S = 20.0
_WAIT_S = 5.0


@dataclass(kw_only=True)
class ProxySplit:
    """What both load balancers share."""

    folder: Path
    run: Run
    _run_now: Run = field(init=False)
    """With the share that was written last."""
    _seen: Live | None = field(default=None, init=False)
    """What was read or written last.
    A write fails if another command wrote its progress meanwhile."""

    def __post_init__(self) -> None:
        self._run_now = self.run

    @property
    def deploy(self) -> ProxyDeploy:
        """The options, with the share that was written last."""
        assert isinstance(self._run_now.deploy, ProxyDeploy), self._run_now.deploy.kind
        return self._run_now.deploy

    @property
    def version(self) -> str:
        """Return a hash of the addresses of the new version."""
        return sha256_of(" ".join(self.deploy.canary_addresses).encode())[:12]

    @property
    def canary_matchers(self) -> tuple[str, ...]:
        """Return matchers of the servers of the new version, by the address that Prometheus scrapes."""
        return _instances(self.deploy.canary_addresses)

    @property
    def baseline_matchers(self) -> tuple[str, ...]:
        """Return matchers of the other servers."""
        return _instances(self.deploy.addresses(self.run))

    def check_files(self) -> None:
        """Raise if the user changed the configuration, which would be overwritten."""
        name = nginx.CONFIGURATION if isinstance(self.deploy, NginxDeploy) else haproxy.CONFIGURATION
        if changed_files(self.folder, [name]):
            why = f"{name} was changed since launch deploy wrote it, and would be overwritten"
            raise ConfigError("DIR", self.folder, why=why, fix="render it again, or change weights by hand")

    def problem(self) -> str | None:
        """Return why no server of the new version is ready."""
        addresses = self.deploy.canary_addresses
        if any(_is_ready(address) for address in addresses):
            return None
        return f"no server of deploy.canary_upstreams is ready: {', '.join(addresses)}"

    @property
    def _progress(self) -> Progress | None:
        try:
            text = read_regular(self.folder / PROGRESS_FILE).decode(errors="replace")
        except FileNotFoundError:
            return None
        return load_progress(text, version=self.version)

    def _check_unchanged(self) -> None:
        """Raise if another command, as ``launch deploy rollback``, changed the weights since."""
        if self._seen is not None and self._progress != self._seen.progress:
            raise EnvironmentProblem(
                f"{self.folder}: another launch deploy changed the weights meanwhile, and they stay"
            )

    def _keep(self, progress: Progress) -> None:
        path = self.folder / PROGRESS_FILE
        try:
            write_atomic(path, progress.dump() + "\n")
        except OSError as error:
            raise EnvironmentProblem(f"{path} cannot be written: {error.strerror or error}") from error
        self._seen = Live(percent=progress.percent, progress=progress)

    def _rendered(self, percent: int) -> tuple[Run, Sequence[Upstream]]:
        run = with_share(self.run, percent)
        assert isinstance(run.deploy, ProxyDeploy), run.deploy.kind
        return run, upstreams_of(run.deploy, run)

    def _replace(self, run: Run, name: str, render: Callable[[Run], str]) -> None:
        """Write the configuration of a run; the user's own is never overwritten."""
        self.check_files()
        update_folder(self.folder, run, {name: render(run)})
        self._run_now = run


@dataclass(kw_only=True)
class HaproxySplit(ProxySplit):
    """HAProxy, by the socket of its runtime API."""

    @property
    def where(self) -> str:
        """Return the socket."""
        return f"HAProxy at {self._socket}"

    def read(self) -> Live:
        """Return the weights of the running process."""
        weights = self._weights()
        new = sum(weight for name, weight in weights.items() if name.startswith(CANARY_PREFIX))
        share = share_of_weights(sum(weights.values()) - new, new)
        known = (0, 100, *self._options.canary_steps, self.deploy.canary_share)
        nearest = min(known, key=lambda percent: abs(percent - share))
        # weights of many servers are rounded to integers
        percent = nearest if abs(nearest - share) <= 1 else round(share)
        self._seen = Live(percent=percent, progress=self._progress)
        return self._seen

    def write(self, progress: Progress) -> None:
        """Set the weights in the running process, then write them into the file for its next start."""
        self._check_unchanged()
        run, upstreams = self._rendered(progress.percent)
        wanted = {each.name: each.weight or 0 for each in upstreams}
        if self._weights() != wanted:
            # what gets more comes first, so that no moment is without a server
            ordered = sorted(wanted, key=lambda name: wanted[name], reverse=True)
            said = self._tell(*(f"set server {haproxy.BACKEND}/{name} weight {wanted[name]}" for name in ordered))
            if self._weights() != wanted:
                raise EnvironmentProblem(f"{self.where} refuses the weights {wanted}: {said.strip()}")
        self._keep(progress)
        if run.deploy != self._run_now.deploy:
            self._replace(run, haproxy.CONFIGURATION, haproxy.configuration)

    @property
    def _options(self) -> HaproxyDeploy:
        assert isinstance(self.deploy, HaproxyDeploy), self.deploy.kind
        return self.deploy

    @property
    def _socket(self) -> str:
        assert self._options.admin_socket is not None, "validate requires it of a canary"
        return self._options.admin_socket

    def _weights(self) -> dict[str, int]:
        """Return the weight of each server of the running process."""
        lines = self._tell(f"show servers state {haproxy.BACKEND}").splitlines()
        header = next((line.lstrip("# ").split() for line in lines if line.startswith("#")), [])
        rows = [dict(zip(header, line.split(), strict=False)) for line in lines if line[:1].isdigit() and " " in line]
        try:
            found = {row["srv_name"]: int(row["srv_uweight"]) for row in rows}
        except (KeyError, ValueError) as error:
            raise EnvironmentProblem(f"{self.where} does not say its servers: {' '.join(lines)[:200]!r}") from error
        _, upstreams = self._rendered(self.deploy.canary_share)
        if found.keys() != {each.name for each in upstreams}:
            why = f"{self.where} has the servers {', '.join(found) or '(none)'}"
            raise EnvironmentProblem(f"{why}: start it with {self.folder / haproxy.CONFIGURATION} first")
        return found

    def _tell(self, *commands: str) -> str:
        """Send commands and return what HAProxy answers."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_TIMEOUT_S)
                connection.connect(self._socket)
                connection.sendall("; ".join(commands).encode() + b"\n")
                parts = []
                while part := connection.recv(1 << 16):
                    parts.append(part)
        except OSError as error:
            why = f"{self.where} cannot be reached: {error.strerror or error}"
            fix = f"start it with {self.folder / haproxy.CONFIGURATION}, on this machine and as this user"
            raise EnvironmentProblem(f"{why}; {fix}") from error
        return b"".join(parts).decode(errors="replace")


@dataclass(kw_only=True)
class NginxSplit(ProxySplit):
    """nginx, by its configuration and a reload."""

    @property
    def where(self) -> str:
        """Return the file."""
        return f"nginx with {self._file}"

    def read(self) -> Live:
        """Return the weights in its file."""
        self._seen = Live(percent=self.deploy.canary_share, progress=self._progress)
        return self._seen

    def write(self, progress: Progress) -> None:
        """Write the weights into the file, and let nginx read it again."""
        self._check_unchanged()
        run, _ = self._rendered(progress.percent)
        before = self._run_now
        if run.deploy != before.deploy:
            self._replace(run, nginx.CONFIGURATION, nginx.configuration)
        is_written = self._progress is not None and self._progress.percent == progress.percent
        if run.deploy != before.deploy or not is_written:
            try:
                self._nginx("-t", "-q")
                self._nginx("-s", "reload")
            except EnvironmentProblem:
                self._replace(before, nginx.CONFIGURATION, nginx.configuration)
                raise
        self._keep(progress)

    @property
    def _file(self) -> Path:
        return (self.folder / nginx.CONFIGURATION).absolute()

    def _nginx(self, *words: str) -> None:
        """Run the program with the configuration of the folder."""
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None:
            raise EnvironmentProblem(f"{self.where}: nginx is not installed on this machine; promote where it runs")
        argv = [program, "-e", "stderr", "-c", str(self._file), *words]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise EnvironmentProblem(f"{self.where}: nginx {' '.join(words)} did not end in time") from error
        if done.returncode:
            fix = f"start it with nginx -c {self._file}, on this machine and as this user"
            raise EnvironmentProblem(f"{self.where}: nginx {' '.join(words)} failed: {done.stderr.strip()}; {fix}")


def proxy_split(folder: Path, run: Run) -> HaproxySplit | NginxSplit:
    """Return the split of a folder of ``deploy=nginx`` or ``deploy=haproxy``."""
    if isinstance(run.deploy, NginxDeploy):
        return NginxSplit(folder=folder, run=run)
    return HaproxySplit(folder=folder, run=run)


def _instances(addresses: Sequence[str]) -> tuple[str, ...]:
    """Return a matcher of Prometheus' label ``instance``."""
    return (f"instance=~`{'|'.join(re.escape(address) for address in addresses)}`",)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}{READINESS_PATH}", timeout=_WAIT_S) as response:
            return bool(response.status == 200)
    except OSError:
        return False
