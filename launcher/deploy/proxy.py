"""What nginx and HAProxy share: servers with weights, error bodies and durations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.config.deploy.proxy import ProxyDeploy
from launcher.config.run import Run

REPLICA_PATHS = ("/", "/metrics")
"""Paths that tell of one server alone, and so make no sense behind a load balancer."""
UNLIMITED_PATHS = ("/health/live", "/health/ready", "/version", "/openapi.json")
"""Paths that servers count in no rate."""
READINESS_PATH, LIVENESS_PATH = "/health/ready", "/health/live"
CANARY_PREFIX = "canary-"
"""Begins the names of servers of a new version."""
TLS_CIPHERS = ":".join(
    f"{exchange}-{rest}"
    for rest in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    for exchange in ("ECDHE-ECDSA", "ECDHE-RSA")
)
"""Ciphers of TLS 1.2: all with forward secrecy and authenticated encryption."""
_MAX_S = 20 * 86_400.0
"""HAProxy counts milliseconds in 31 bits."""


@dataclass(frozen=True, kw_only=True)
class ProxyError:
    """An error that the proxy itself answers with."""

    status: int
    message: str
    code: str
    retry_s: int | None = None
    """Value of Retry-After."""

    def body(self) -> str:
        """Return JSON as the server's own errors are, without a character that needs escaping."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": "rate_limit_error" if self.status == 429 else kind,
            "param": None,
            "code": self.code,
        }
        text = json.dumps({"error": error})
        assert not set("'\\$%\n") & set(text), text
        return text


NO_SUCH_PATH = ProxyError(
    status=404, message="this path tells of one server: ask the servers behind this load balancer", code="not_found"
)


def proxy_errors(*, body_bytes: int) -> tuple[ProxyError, ...]:
    """Return the errors of a proxy, one for each status.

    Args:
        body_bytes: largest body.
    """
    return (
        ProxyError(status=400, message="this is not a valid HTTP request", code="invalid_http"),
        ProxyError(status=408, message="the request took too long to arrive", code="body_timeout"),
        ProxyError(
            status=413,
            message=f"the body is larger than the {body_bytes} bytes that the server accepts",
            code="body_too_large",
        ),
        ProxyError(status=429, message="too many requests from this address", code="rate_limit_exceeded", retry_s=1),
        ProxyError(
            status=502, message="the server closed the connection before it responded", code="engine_failed", retry_s=2
        ),
        ProxyError(status=503, message="no server can take this request now", code="busy", retry_s=2),
        ProxyError(status=504, message="the server did not respond in time", code="request_timeout"),
    )


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """One server behind the proxy."""

    name: str
    address: str
    """``HOST:PORT``."""
    weight: int | None = None
    """Its share of the requests, beside those of the others; ``None`` without a canary."""


def upstreams_of(deploy: ProxyDeploy, run: Run) -> Sequence[Upstream]:
    """Return the servers behind a proxy: those of the baseline, then those of a canary."""
    addresses = deploy.addresses(run)
    named = [Upstream(name=f"server-{at}", address=address) for at, address in enumerate(addresses, 1)]
    if not deploy.has_canary:
        return named
    own, new = deploy.weights_at(deploy.canary_share, num_baseline=len(addresses))
    return [
        *(Upstream(name=each.name, address=each.address, weight=own) for each in named),
        *(
            Upstream(name=f"{CANARY_PREFIX}{at}", address=address, weight=new)
            for at, address in enumerate(deploy.canary_addresses, 1)
        ),
    ]


def duration(seconds: float) -> str:
    """Return a time as both nginx and HAProxy read it: ``30s``, ``250ms``."""
    milliseconds = max(1, round(min(seconds, _MAX_S) * 1000))
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"
