"""Options of ``deploy=haproxy``: HAProxy in front of servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.deploy.proxy import ProxyDeploy
from launcher.errors import ConfigError

_MAX_RETRIED_BYTES = 16 * 2**20
_MAX_SOCKET = 96
"""HAProxy adds a suffix while it starts, and the kernel takes 107 characters."""


@dataclass(frozen=True, kw_only=True)
class HaproxyDeploy(ProxyDeploy):
    """``haproxy.cfg``: HAProxy, which asks every server's readiness endpoint."""

    kind: ClassVar[str] = "haproxy"
    summary_fields: ClassVar[tuple[str, ...]] = ("out", "upstreams")
    max_weight: ClassVar[int] = 256

    check_every_s: float = 1.0
    """Seconds between two checks of a server; four times as often after a failed request."""

    check_timeout_s: float = 5.0
    """How long a server may take to answer a check; after three failed ones it gets no requests.
    A connection to it that is silent that long is probed; streams of a host that is gone end after four times this."""

    retried_bytes: int = 2**16
    """Largest request, headers and body, that another server can get when one fails.
    It is the size of HAProxy's buffers, of which each connection takes up to two."""

    metrics_port: int | None = None
    """Port on 127.0.0.1 with HAProxy's own metrics for Prometheus; ``null`` exports none."""

    admin_socket: str | None = None
    """Socket of HAProxy's runtime API, through which ``launch deploy promote`` changes weights.
    Only the account that started HAProxy may open it."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject intervals without sense, and buffers that take all memory."""
        yield from super().validate()
        for name in ("check_every_s", "check_timeout_s"):
            if not 0.1 <= getattr(self, name) <= 3600:
                yield self.error(name, "must lie between 0.1 and 3600", f"leave deploy.{name} out")
        yield from self.validate_minimum(2**14, "retried_bytes")
        if self.retried_bytes > _MAX_RETRIED_BYTES:
            why = f"is more than {_MAX_RETRIED_BYTES}, which each connection would take twice"
            yield self.error("retried_bytes", why, "set deploy.retried_bytes=1048576")
        yield from self.validate_port("metrics_port")
        yield from self.validate_path("admin_socket", example="/run/haproxy/launcher.sock")
        if self.admin_socket is not None and len(self.admin_socket) > _MAX_SOCKET:
            yield self.error("admin_socket", f"is longer than {_MAX_SOCKET} characters", "choose a shorter path")
        if self.has_canary and self.admin_socket is None:
            why = "HAProxy changes the weights of a canary through its runtime API"
            yield ConfigError("deploy.admin_socket", why=why, fix="set deploy.admin_socket=/run/haproxy/launcher.sock")
        if self.metrics_port == self.port:
            yield self.error("metrics_port", "is deploy.port", f"set deploy.metrics_port={self.port % 65535 + 1}")

    def validate_tls(self) -> Iterator[ConfigError]:
        """Require a key where HAProxy looks for one."""
        yield from super().validate_tls()
        certificate = self.tls_certificate_file
        if certificate is None or self.tls_key_file is None:
            return
        expected = f"{certificate.removesuffix('.crt')}.key"
        if self.tls_key_file not in (expected, certificate):
            why = f"HAProxy finds the key of {certificate} in {expected}, or in the certificate's file"
            yield self.error("tls_key_file", why, f"move it there, and set deploy.tls_key_file={expected}")
