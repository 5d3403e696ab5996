"""Fields that every load balancer in front of servers has."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import ClassVar, Self

from launcher.config.deploy.base import UnusedOptions
from launcher.config.deploy.canary import CanaryDeploy, share_of_weights, split_weights
from launcher.config.inference import connections_per_client
from launcher.config.job.serve import Serve
from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.protocol.plan import Plan

_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*"
)
_ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_PATH = re.compile(r"/[A-Za-z0-9._/@%+=:,-]*")
"""Characters that mean nothing in nginx's, HAProxy's and Compose's languages, quoted or not."""
_MAX_UPSTREAMS = 256
_CHECK_CONNECTIONS = 4
SLACK_S = 5.0
"""Seconds that the server has to send its own error before the proxy gives up."""
WRITE_TIMEOUT_S = 60.0
"""After so long without reading anything a client is gone, for the proxy as for the server."""


def is_host(text: str) -> bool:
    """Whether ``text`` is an IP address or a host name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        digits = text.rpartition(".")[2]
        return _HOST_NAME.fullmatch(text) is not None and not digits.isdigit()
    return "%" not in text


def bracketed(host: str, port: int) -> str:
    """Return ``HOST:PORT``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_any(host: str) -> bool:
    """Whether ``host`` stands for all interfaces of a machine."""
    return host in ("0.0.0.0", "::")  # noqa: S104 (compared)


def _is_loopback(host: str) -> bool:
    """Whether ``host`` is only reached on its own machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_upstream(text: str) -> str | None:
    """Return the canonical ``HOST:PORT`` of an upstream; ``None`` for what is none."""
    host, colon, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if is_bracketed else host
    if not colon or not re.fullmatch(r"[1-9][0-9]{0,4}", port, re.ASCII) or int(port) > 65535:
        return None
    if not is_host(host) or (":" in host) != is_bracketed:
        return None
    return bracketed(host.lower(), int(port))


def validate_safe_path(option: str, path: str | None, *, example: str) -> Iterator[ConfigError]:
    """Yield why a path cannot stand in the configuration of a proxy.

    Args:
        option: that holds it.
        path: on the proxy's machine; ``None`` is fine.
        example: of a path for this option.
    """
    if path is None:
        return
    if not path.startswith("/"):
        why = "is not absolute, and the proxy does not start in your folder"
        yield ConfigError(option, path, why=why, fix=f"give the whole path: {option}={example}")
    elif not _PATH.fullmatch(path) or ".." in PurePosixPath(path).parts:
        why = "has characters that configuration files of proxies cannot hold safely, or a part .."
        yield ConfigError(option, path, why=why, fix="use letters, digits and . _ / @ % + = : , - only")


@dataclass(frozen=True, kw_only=True)
class ProxyDeploy(CanaryDeploy):
    """A load balancer: one address for several servers, with TLS, limits and retries."""

    canary_option: ClassVar[str] = "deploy.canary_upstreams=[HOST:PORT], servers of a new version"
    share_option: ClassVar[str] = "deploy.canary_percent"
    max_weight: ClassVar[int] = 65535
    """Largest weight of a server."""

    host: str = "127.0.0.1"
    """Address to listen on; ``0.0.0.0`` is all IPv4 interfaces, ``::`` all of IPv6."""

    port: int = 8080
    """Port to listen on."""

    upstreams: tuple[str, ...] = ()
    """Servers behind it, as ``HOST:PORT``; empty takes job.host and job.port."""

    canary_upstreams: tuple[str, ...] = ()
    """Servers of a new version, which get ``canary_percent`` of the requests.
    Requests are then shared out by weight, and no longer by the number of open ones."""

    canary_percent: int = 0
    """Percent of the requests to ``canary_upstreams``; ``launch deploy promote`` raises it."""

    tls_certificate_file: str | None = None
    """File with the certificate and its chain, on the proxy's machine; ``null``: no TLS."""

    tls_key_file: str | None = None
    """File with the private key."""

    rate_per_minute: int | None = None
    """Requests per minute of each client to all servers; ``null`` takes job.rate_per_minute.
    A client is an IPv4 address, or the /64 of an IPv6 address."""

    user: str | None = None
    """Account that the proxy changes to after root started it; ``null`` changes nothing."""

    user_group: str | None = None
    """Group of that account; ``null`` takes the one of the same name."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject what the proxy's language would read as something else."""
        yield from super().validate()
        yield from self.validate_minimum(1, "rate_per_minute")
        if not is_host(self.host):
            yield self.error("host", "is neither an IP address nor a host name", "set deploy.host=0.0.0.0")
        yield from self.validate_port("port")
        yield from self._validate_servers()
        yield from self._validate_canary()
        for name in ("tls_certificate_file", "tls_key_file"):
            yield from self.validate_path(name, example="/etc/ssl/FILE")
        for name, what in (("user", "an account"), ("user_group", "a group")):
            if getattr(self, name) is not None and not _ACCOUNT.fullmatch(getattr(self, name)):
                yield self.error(name, f"is not the name of {what}", f"set deploy.{name}=www-data")
        if self.user_group is not None and self.user is None:
            yield self.error("user_group", "has no account", "set deploy.user=ACCOUNT")
        yield from self.validate_tls()

    def _validate_servers(self) -> Iterator[ConfigError]:
        named = {"upstreams": self.upstreams, "canary_upstreams": self.canary_upstreams}
        num_servers = sum(map(len, named.values()))
        if num_servers > _MAX_UPSTREAMS:
            why = f"{num_servers} servers are more than {_MAX_UPSTREAMS}"
            yield ConfigError("deploy.upstreams", why=why, fix="start a second load balancer for the others")
        seen: set[str] = set()
        for name, servers in named.items():
            for at, each in enumerate(servers):
                option, found = f"deploy.{name}[{at}]", parse_upstream(each)
                if found is None:
                    why = "is not HOST:PORT"
                    yield ConfigError(option, each, why=why, fix=f"write it like deploy.{name}=[10.0.0.1:8000]")
                elif found in seen:
                    yield ConfigError(option, each, why="is there twice", fix="name every server once")
                seen.add(found or "")

    def _validate_canary(self) -> Iterator[ConfigError]:
        if not 0 <= self.canary_percent <= 100:
            yield self.error("canary_percent", "must lie between 0 and 100", "set deploy.canary_percent=5")
        elif self.canary_percent and not self.has_canary:
            yield self.error("canary_percent", "there are no servers of a new version", f"set {self.canary_option}")
        if not self.has_canary:
            return
        for percent in {*self.canary_steps, self.canary_percent}:
            if not 0 < percent < 100:
                continue
            num_baseline, num_canary = max(1, len(self.upstreams)), len(self.canary_upstreams)
            weights = self.weights_at(percent, num_baseline=num_baseline)
            got = share_of_weights(weights[0] * num_baseline, weights[1] * num_canary)
            if abs(got - percent) > 1:
                option = "canary_percent" if percent == self.canary_percent else "canary_steps"
                why = f"{percent} percent of {num_baseline} and {num_canary} servers would be {got:.0f} percent, "
                why += f"because weights go to {self.max_weight}"
                yield self.error(option, why, "name about as many servers of each version, or leave the step out")

    def weights_at(self, percent: int, *, num_baseline: int) -> tuple[int, int]:
        """Return the weights of a server of the baseline and one of the canary."""
        return split_weights(
            percent, num_baseline=num_baseline, num_canary=len(self.canary_upstreams), limit=self.max_weight
        )

    @property
    def has_canary(self) -> bool:
        """Whether servers of a new version are behind it."""
        return bool(self.canary_upstreams)

    @property
    def canary_share(self) -> int:
        """Percent of the requests to the new version."""
        return self.canary_percent

    @property
    def version_names(self) -> tuple[str, str]:
        """Names of the two groups of servers."""
        return "baseline", "canary"

    def with_canary_share(self, percent: int) -> Self:
        """Return the same options with another share of the new version."""
        return replace(self, canary_percent=percent)

    def validate_tls(self) -> Iterator[ConfigError]:
        """Reject a key without a certificate."""
        if self.tls_key_file is not None and self.tls_certificate_file is None:
            yield self.error("tls_key_file", "has no certificate", "set deploy.tls_certificate_file=FILE")

    def validate_port(self, name: str) -> Iterator[ConfigError]:
        """Reject a port that does not exist, or that a user other than root cannot listen on."""
        port = getattr(self, name)
        if port is None:
            return
        if not 0 < port < 65536:
            yield self.error(name, "must lie between 1 and 65535", f"set deploy.{name}=8080")
        elif port < 1024 and self.user is None:
            why = "only root may listen on a port below 1024"
            fix = f"set deploy.user=ACCOUNT, which root's proxy then changes to, or deploy.{name}=8080"
            yield self.error(name, why, fix)

    def validate_path(self, name: str, *, example: str) -> Iterator[ConfigError]:
        """Reject a path that is not absolute, or that no quotes make safe."""
        yield from validate_safe_path(f"deploy.{name}", getattr(self, name), example=example)

    def unused_options(self, run: Run) -> Iterator[UnusedOptions]:
        """Add the name, which no load balancer has."""
        yield from super().unused_options(run)
        yield UnusedOptions(("name",), f"nothing in the configuration of deploy={self.kind} has a name")

    def validate_run(self, run: Run, plan: Plan) -> Iterator[ConfigError]:
        """Reject a rate that servers would count for the proxy instead of for its clients."""
        yield from super().validate_run(run, plan)
        job = run.job
        if not isinstance(job, Serve):
            return
        if job.rate_per_minute is not None and job.api_keys_file is None and not job.trusted_proxies:
            why = "without API keys a server counts by address, and all requests come from the proxy's"
            fix = "set job.trusted_proxies=[ADDRESS OF THE PROXY], or deploy.rate_per_minute instead"
            yield ConfigError("job.rate_per_minute", job.rate_per_minute, why=why, fix=fix)
        yield from self._validate_loop()
        for at, each in enumerate(self.canary_addresses):
            if each in self.addresses(run) and not self.upstreams:
                why = "is the server of this run (job.host, job.port), and so the baseline"
                yield ConfigError(
                    f"deploy.canary_upstreams[{at}]", each, why=why, fix="name the server of a new version"
                )
        if not self.upstreams and job.port == self.port and self._listens_at(job.host):
            yield self.error("port", "is the server's own (job.port)", f"set deploy.port={job.port % 65535 + 1}")

    def _validate_loop(self) -> Iterator[ConfigError]:
        """Yield the servers that are the proxy itself, which would answer its own requests."""
        named = {"upstreams": self.upstreams, "canary_upstreams": self.canary_upstreams}
        for name, at, each in ((name, at, each) for name, servers in named.items() for at, each in enumerate(servers)):
            host, _, port = (parse_upstream(each) or "").rpartition(":")
            if port == str(self.port) and self._listens_at(host.strip("[]")):
                why = (
                    f"is the proxy's own address ({bracketed(self.host, self.port)}), so requests would go in a circle"
                )
                fix = "name the address of a server, or set another deploy.port"
                yield ConfigError(f"deploy.{name}[{at}]", each, why=why, fix=fix)

    def _listens_at(self, host: str) -> bool:
        """Return whether ``host`` is where the proxy listens, as far as its text says."""
        own, other = self.host.lower(), host.lower()
        if own == other or _is_any(other):
            return True
        return _is_loopback(other) and (_is_any(own) or (_is_loopback(own) and "localhost" in (own, other)))

    def addresses(self, run: Run) -> Sequence[str]:
        """Return ``HOST:PORT`` of every server but those of a new version."""
        job = served_job(run)
        if self.upstreams:
            return [found for each in self.upstreams if (found := parse_upstream(each)) is not None]
        any_address = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (replaced)
        return [bracketed(any_address.get(job.host, job.host), job.port)]

    @property
    def canary_addresses(self) -> Sequence[str]:
        """Return ``HOST:PORT`` of every server of the new version."""
        return [found for each in self.canary_upstreams if (found := parse_upstream(each)) is not None]

    def requests_per_minute(self, run: Run) -> int | None:
        """Return the limit for each client; ``None`` sets none."""
        return self.rate_per_minute or getattr(run.job, "rate_per_minute", None)


@dataclass(frozen=True, kw_only=True)
class UpstreamLimits:
    """Times, sizes and numbers of a proxy that fit the servers behind it."""

    body_bytes: int
    """Largest body, the server's own limit."""
    read_s: float
    """For the headers of a request, and for its body."""
    queue_s: float
    """For a connection to a server."""
    response_s: float
    """For a whole answer, so also between two tokens: a little more than the server's own limit."""
    connections: int
    """Those that one server accepts from the proxy's address.
    Some are left for checks of its health."""


def served_job(run: Run) -> Serve:
    """Return the job of a run that ``validate_run`` accepted."""
    assert isinstance(run.job, Serve), "validate_run accepts servers alone"
    return run.job


def upstream_limits(run: Run) -> UpstreamLimits:
    """Return the limits that follow from those of the servers."""
    job = served_job(run)
    return UpstreamLimits(
        body_bytes=job.body_limit(run),
        read_s=job.read_timeout_s,
        queue_s=job.queue_timeout_s,
        response_s=job.request_timeout_s + SLACK_S,
        connections=max(1, connections_per_client(job.max_connections) - _CHECK_CONNECTIONS),
    )
