"""``nginx.conf`` for ``deploy=nginx``, and for the nginx of a compose file."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.config.deploy.nginx import NginxDeploy
from launcher.config.deploy.proxy import WRITE_TIMEOUT_S, UpstreamLimits, bracketed, upstream_limits
from launcher.config.run import Run
from launcher.deploy.proxy import (
    NO_SUCH_PATH,
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

CONFIGURATION = "nginx.conf"
_CONNECT_S = 2.0
_SPARE_CONNECTIONS = 512
"""For clients that wait or idle, beside those of requests that servers process."""
_HEAD_BYTES = 16 * 1024
"""The server's own limit of a request's head."""
_LOG = (
    '{"time":"$time_iso8601","client":"$remote_addr","method":"$request_method","path":"$uri","status":$status,'
    '"seconds":$request_time,"bytes":$bytes_sent,"servers":"$upstream_addr","statuses":"$upstream_status",'
    '"head_seconds":"$upstream_header_time"}'
)


def render(run: Run, plan: Plan) -> dict[str, str]:
    """Return ``nginx.conf``."""
    return {CONFIGURATION: configuration(run)}


def configuration(run: Run) -> str:
    """Return the whole configuration for the servers of a run."""
    deploy = run.deploy
    assert isinstance(deploy, NginxDeploy), deploy.kind
    return nginx_configuration(
        deploy,
        upstreams=upstreams_of(deploy, run),
        limits=upstream_limits(run),
        rate_per_minute=deploy.requests_per_minute(run),
    )


def nginx_configuration(
    deploy: NginxDeploy,
    *,
    upstreams: Sequence[Upstream],
    limits: UpstreamLimits,
    rate_per_minute: int | None,
) -> str:
    """Return the whole configuration of one nginx.

    Args:
        deploy: address, TLS, logs; its values are safe within double quotes.
        upstreams: every server.
        limits: of one server.
        rate_per_minute: requests of one client; ``None`` sets no limit.
    """
    num_connections = 2 * limits.connections * len(upstreams) + _SPARE_CONNECTIONS
    folder = deploy.log_folder
    lines = [
        "# Load balancer of job=serve, written by launch deploy.",
        *([f"user {deploy.user} {deploy.user_group or deploy.user};"] if deploy.user else []),
        "worker_processes auto;",
        f"worker_rlimit_nofile {num_connections + _SPARE_CONNECTIONS};",
        f'error_log "{folder}/error.log" warn;' if folder else "error_log stderr warn;",
        *([f'pid "{deploy.temporary_folder}/nginx.pid";'] if deploy.temporary_folder else []),
        "",
        "events {",
        f"    worker_connections {num_connections};",
        "}",
        "",
        "http {",
        *_indented(_http(deploy, limits)),
        "",
        *_indented(_upstream(deploy, upstreams, limits)),
        "",
        *_indented(_clients(rate_per_minute)),
        "    server {",
        *_indented(_server(deploy, limits, num_servers=len(upstreams), rate_per_minute=rate_per_minute), by=8),
        "    }",
        "}",
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _http(deploy: NginxDeploy, limits: UpstreamLimits) -> list[str]:
    log = f'"{deploy.log_folder}/access.log"' if deploy.log_folder else "/dev/stdout"
    parts = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi") if deploy.temporary_folder else ()
    return [
        "server_tokens off;",
        "default_type application/json;",
        f"log_format requests escape=json '{_LOG}';",
        f"access_log {log} requests;",
        *(f'{part}_temp_path "{deploy.temporary_folder}/{part}";' for part in parts),
        "",
        "# The server's own limits. Bodies stay in memory, so that another server can get them.",
        f"client_header_timeout {duration(limits.read_s)};",
        f"client_body_timeout {duration(limits.read_s)};",
        f"client_max_body_size {limits.body_bytes};",
        f"client_body_buffer_size {limits.body_bytes};",
        f"large_client_header_buffers 4 {_HEAD_BYTES};",
        f"send_timeout {duration(WRITE_TIMEOUT_S)};",
        "tcp_nodelay on;",
        "gzip off;",
    ]


def _upstream(deploy: NginxDeploy, upstreams: Sequence[Upstream], limits: UpstreamLimits) -> list[str]:
    health = f"max_fails=1 fail_timeout={duration(deploy.fail_timeout_s)} max_conns={limits.connections}"
    again = f"max_fails=0 max_conns={limits.connections} backup"
    is_any = len(upstreams) > 1
    return [
        "upstream servers {",
        "    zone servers 256k;  # all workers count the same connections",
        *(_SHARED_BY_WEIGHT if deploy.has_canary else ["    least_conn;"]),
        *(f"    server {each.address} {_weight(each)}{health};" for each in upstreams),
        *(["    # Where all have failed lately, any may be back: each is asked once more."] if is_any else []),
        *(f"    server {each.address} {_weight(each)}{again};" for each in upstreams if is_any and each.weight != 0),
        "}",
    ]


_SHARED_BY_WEIGHT = ("    # The shares of both versions are exact, however slow one of them is.",)


def _weight(upstream: Upstream) -> str:
    if upstream.weight is None:
        return ""
    return f"weight={upstream.weight} " if upstream.weight else "down "


def _clients(rate_per_minute: int | None) -> list[str]:
    if rate_per_minute is None:
        return []
    return [
        "# A client is an IPv4 address, or the /64 of an IPv6 address.",
        "map $remote_addr $client {",
        '    "~^::ffff:(?<mapped>[0-9.]+)$" $mapped;',
        '    "~^(?<network>(?:[0-9a-f]+:){4})" $network;',
        '    "~^(?<shortened>[0-9a-f:]*?::)" $shortened;',
        "    default $remote_addr;",
        "}",
        f"limit_req_zone $client zone=clients:16m rate={rate_per_minute}r/m;",
        "limit_req_status 429;",
        "limit_req_log_level warn;",
        "",
    ]


def _server(deploy: NginxDeploy, limits: UpstreamLimits, *, num_servers: int, rate_per_minute: int | None) -> list[str]:
    is_secure = deploy.tls_certificate_file is not None
    burst = f" burst={rate_per_minute - 1} nodelay" if rate_per_minute is not None and rate_per_minute > 1 else ""
    return [
        f"listen {bracketed(deploy.host, deploy.port)}{' ssl' if is_secure else ''} so_keepalive=30s:10s:3;",
        "server_name _;",
        *(_tls(deploy) if is_secure else []),
        "",
        *_proxying(limits, num_servers=num_servers),
        "",
        "location / {",
        *([f"    limit_req zone=clients{burst};"] if rate_per_minute is not None else []),
        "    proxy_pass http://servers;",
        "}",
        *(f"location = {path} {{ proxy_pass http://servers; }}" for path in UNLIMITED_PATHS),
        *(f"location = {path} {{ return 404 '{NO_SUCH_PATH.body()}'; }}" for path in REPLICA_PATHS),
        "",
        "# Errors of nginx itself; those of servers pass as they are.",
        *(line for error in proxy_errors(body_bytes=limits.body_bytes) for line in _error_page(error)),
    ]


def _tls(deploy: NginxDeploy) -> list[str]:
    return [
        f'ssl_certificate "{deploy.tls_certificate_file}";',
        f'ssl_certificate_key "{deploy.tls_key_file}";',
        "ssl_protocols TLSv1.2 TLSv1.3;",
        f"ssl_ciphers {TLS_CIPHERS};",
        "ssl_prefer_server_ciphers off;",
        "ssl_session_cache shared:tls:10m;",
        "ssl_session_timeout 1d;",
        "ssl_session_tickets off;",
    ]


def _proxying(limits: UpstreamLimits, *, num_servers: int) -> list[str]:
    return [
        "proxy_http_version 1.1;",
        "proxy_set_header Host $http_host;",
        "proxy_set_header X-Forwarded-For $remote_addr;  # never what the client says",
        "proxy_set_header X-Forwarded-Proto $scheme;",
        "proxy_socket_keepalive on;",
        "",
        "# Each token is sent at once. A client that leaves ends its request at the server.",
        "proxy_buffering off;",
        "proxy_request_buffering on;",
        "proxy_ignore_client_abort off;",
        f"proxy_connect_timeout {duration(_CONNECT_S)};",
        f"proxy_send_timeout {duration(limits.read_s)};",
        f"proxy_read_timeout {duration(limits.response_s)};",
        "",
        "# Another server gets a request only if the client got nothing yet. A draining server answers 503.",
        "proxy_next_upstream error timeout invalid_header http_503 non_idempotent;",
        f"proxy_next_upstream_tries {2 * num_servers};",
        f"proxy_next_upstream_timeout {duration(limits.queue_s)};",
    ]


_RENAMED = {400: (400, 494, 497), 503: (502, 503)}
"""Statuses that nginx gives where it means another.
494 and 497 are its own, and 502 says that no server was left."""


def _error_page(error: ProxyError) -> list[str]:
    if error.status == 502:
        return []
    statuses = _RENAMED.get(error.status, (error.status,))
    retry = f"add_header Retry-After {error.retry_s} always; " if error.retry_s is not None else ""
    path = f"/_error/{error.status}"
    return [
        f"error_page {' '.join(map(str, statuses))} ={error.status} {path};",
        f"location = {path} {{ internal; {retry}return {error.status} '{error.body()}'; }}",
    ]


def _indented(lines: Sequence[str], *, by: int = 4) -> list[str]:
    return [" " * by + line if line else "" for line in lines]
