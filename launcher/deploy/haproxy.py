"""``haproxy.cfg`` for ``deploy=haproxy``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from launcher.config.deploy.haproxy import HaproxyDeploy
from launcher.config.deploy.proxy import UpstreamLimits, bracketed, upstream_limits
from launcher.config.run import Run
from launcher.deploy.proxy import (
    NO_SUCH_PATH,
    READINESS_PATH,
    REPLICA_PATHS,
    TLS_CIPHERS,
    UNLIMITED_PATHS,
    ProxyError,
    Upstream,
    duration,
    proxy_errors,
    upstreams_of,
)
from launcher.protocol.plan import Plan

CONFIGURATION = "haproxy.cfg"
BACKEND = "servers"
"""Name of the servers' section."""
_CONNECT_S = 2.0
_RETRIES = 3
_FAILED_CHECKS = 3
"""Checks, or keep-alive probes, in a row without an answer after which a server is down."""
_REWRITE_BYTES = 1024
"""Part of a buffer that HAProxy keeps for headers that it adds."""
_SPARE_CONNECTIONS = 512
_METRICS_PATH = "/metrics"


def render(run: Run, plan: Plan) -> dict[str, str]:
    """Return ``haproxy.cfg``."""
    return {CONFIGURATION: configuration(run)}


def configuration(run: Run) -> str:
    """Return the whole configuration."""
    deploy = run.deploy
    assert isinstance(deploy, HaproxyDeploy), deploy.kind
    limits, upstreams = upstream_limits(run), upstreams_of(deploy, run)
    sections = [
        ["# Load balancer of job=serve, written by launch deploy.", *_global(deploy, limits, len(upstreams))],
        _defaults(deploy, limits),
        _frontend(deploy, limits, deploy.requests_per_minute(run)),
        _backend(deploy, limits, upstreams),
        *([_metrics(deploy.metrics_port)] if deploy.metrics_port is not None else []),
        *([_clients()] if deploy.requests_per_minute(run) is not None else []),
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _global(deploy: HaproxyDeploy, limits: UpstreamLimits, num_servers: int) -> list[str]:
    return [
        "global",
        *([f"    user {deploy.user}", f"    group {deploy.user_group or deploy.user}"] if deploy.user else []),
        "    log stdout format raw local0 info",
        *([f"    stats socket {deploy.admin_socket} mode 600 level admin"] if deploy.admin_socket else []),
        f"    maxconn {limits.connections * num_servers + _SPARE_CONNECTIONS}",
        f"    tune.bufsize {deploy.retried_bytes + _REWRITE_BYTES}  # a request that fits can go to another server",
        f"    tune.maxrewrite {_REWRITE_BYTES}",
        *(_tls() if deploy.tls_certificate_file else []),
    ]


def _tls() -> list[str]:
    return [
        "    ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets",
        f"    ssl-default-bind-ciphers {TLS_CIPHERS}",
        "    ssl-load-extra-del-ext",
        "    tune.ssl.default-dh-param 2048",
    ]


def _defaults(deploy: HaproxyDeploy, limits: UpstreamLimits) -> list[str]:
    probe_s = math.ceil(max(deploy.check_every_s, deploy.check_timeout_s))
    return [
        "defaults",
        "    mode http",
        "    log global",
        "    option httplog",
        "    option dontlognull",
        "    # Each token is sent at once. A client that leaves ends its request at the server.",
        "    option http-no-delay",
        "    option abortonclose",
        "    option http-server-close",
        "    option clitcpka",
        "    # Connections to a server whose host or network is gone end: nothing else does, while it sends nothing.",
        "    option srvtcpka",
        f"    srvtcpka-idle {probe_s}s",
        f"    srvtcpka-intvl {probe_s}s",
        f"    srvtcpka-cnt {_FAILED_CHECKS}",
        "    # The whole request is read first: only then can another server get it.",
        "    option http-buffer-request",
        f"    timeout http-request {duration(limits.read_s)}",
        "    timeout http-keep-alive 75s",
        f"    timeout connect {duration(_CONNECT_S)}",
        f"    timeout queue {duration(limits.queue_s)}",
        f"    timeout client {duration(limits.response_s)}",
        f"    timeout server {duration(limits.response_s)}",
        "    # Another server gets a request only if the client got nothing yet. A draining server answers 503.",
        f"    retries {_RETRIES}",
        "    retry-on conn-failure empty-response 503",
        "    option redispatch 1",
        "    # Errors of HAProxy itself; those of servers pass as they are.",
        *(f"    {_error(each)}" for each in proxy_errors(body_bytes=limits.body_bytes)),
    ]


def _error(error: ProxyError) -> str:
    return f"http-error status {error.status} {_content(error)}"


def _content(error: ProxyError) -> str:
    retry = f" hdr Retry-After {error.retry_s}" if error.retry_s is not None else ""
    return f"content-type application/json string '{error.body()}'{retry}"


def _return(error: ProxyError, condition: str) -> str:
    return f"http-request return status {error.status} {_content(error)} if {condition}"


def _frontend(deploy: HaproxyDeploy, limits: UpstreamLimits, rate_per_minute: int | None) -> list[str]:
    errors = {each.status: each for each in proxy_errors(body_bytes=limits.body_bytes)}
    certificate = f" ssl crt '{deploy.tls_certificate_file}'" if deploy.tls_certificate_file else ""
    lines = [
        "frontend clients",
        f"    bind {bracketed(deploy.host, deploy.port)}{certificate}",
        "    http-request set-header X-Forwarded-For %[src]  # never what the client says",
        f"    http-request set-header X-Forwarded-Proto {'https' if certificate else 'http'}",
        f"    acl of_one_server path,url_dec -m str {' '.join(REPLICA_PATHS)}",
        f"    {_return(NO_SUCH_PATH, 'of_one_server')}",
        f"    {_return(errors[413], f'{{ req.hdr_val(content-length) gt {limits.body_bytes} }}')}",
    ]
    if rate_per_minute is not None:
        exceeded = f"{{ sc0_gpc0_rate(client_rates) ge {rate_per_minute} }}"
        lines += [
            "    # A client is an IPv4 address, or the /64 of an IPv6 address.",
            f"    acl unlimited path,url_dec -m str {' '.join(UNLIMITED_PATHS)}",
            "    http-request track-sc0 src,ipmask(32,64) table client_rates if !unlimited",
            f"    {_return(errors[429], f'!unlimited {exceeded}')}",
            "    http-request sc-inc-gpc0(0) if !unlimited",
        ]
    return [*lines, f"    default_backend {BACKEND}"]


def _backend(deploy: HaproxyDeploy, limits: UpstreamLimits, upstreams: Sequence[Upstream]) -> list[str]:
    check = duration(deploy.check_every_s)
    return [
        f"backend {BACKEND}",
        *(_shared_by_weight() if deploy.has_canary else ["    balance leastconn"]),
        "    option httpchk",
        f"    http-check send meth GET uri {READINESS_PATH} ver HTTP/1.1 hdr Host localhost",
        "    # A server that drains, or is not ready, gets no new requests and finishes those that it has.",
        "    http-check expect error-status L7OKC status 200",
        f"    timeout check {duration(deploy.check_timeout_s)}",
        "    # Not on-marked-down shutdown-sessions: it also ends requests that are about to go to another server.",
        f"    default-server check inter {check} fastinter {duration(deploy.check_every_s / 4)} downinter {check}"
        f" fall {_FAILED_CHECKS} rise 1 observe layer7 error-limit 1 on-error fastinter"
        f" maxconn {limits.connections}",
        *(f"    {_server(each)}" for each in upstreams),
    ]


def _shared_by_weight() -> list[str]:
    return [
        "    # The shares of both versions are exact, however slow one of them is.",
        "    balance roundrobin",
    ]


def _server(upstream: Upstream) -> str:
    weight = "" if upstream.weight is None else f" weight {upstream.weight}"
    return f"server {upstream.name} {upstream.address}{weight}"


def _metrics(port: int) -> list[str]:
    return [
        "frontend metrics",
        f"    bind 127.0.0.1:{port}",
        f"    http-request use-service prometheus-exporter if {{ path {_METRICS_PATH} }}",
        "    http-request return status 404",
    ]


def _clients() -> list[str]:
    return ["backend client_rates", "    stick-table type ipv6 size 100k expire 2m store gpc0,gpc0_rate(60s)"]
