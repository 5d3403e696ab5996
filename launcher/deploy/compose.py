"""``compose.yaml`` and what it mounts, for ``deploy=compose``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launcher.backends.kubernetes.manifest_parts import manifest_text
from launcher.config.deploy.base import keys_path, mounted_paths
from launcher.config.deploy.compose import INNER_PORT, TLS_CERTIFICATE, TLS_KEY, ComposeDeploy
from launcher.config.deploy.proxy import served_job, upstream_limits
from launcher.config.run import Run
from launcher.config.snapshot import dump_run
from launcher.deploy.container_run import RUNS_FOLDER, SNAPSHOT_FOLDER, container_command, container_run
from launcher.deploy.monitoring.render import monitoring_files
from launcher.deploy.nginx import nginx_configuration
from launcher.deploy.proxy import READINESS_PATH, Upstream
from launcher.protocol.plan import Plan

_CACHE_FOLDER = "/cache"
_KEYS = "api_keys"
_STOP_SLACK_S = 10
_PROMETHEUS_PORT, _GRAFANA_PORT = 9090, 3000
"""Ports in the containers of Prometheus and Grafana."""
_HARDENED: dict[str, Any] = {
    "restart": "unless-stopped",
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
}
"""Options of every service."""


def render(run: Run, plan: Plan) -> dict[str, str]:
    """Return ``compose.yaml``, the server's snapshot, and the configurations of the others."""
    deploy = run.deploy
    assert isinstance(deploy, ComposeDeploy), deploy.kind
    port = served_job(run).port
    names = [f"server-{at}" for at in range(1, deploy.servers + 1)]
    nginx = nginx_configuration(
        deploy.nginx(),
        upstreams=[
            Upstream(name=name, address=f"{address}:{port}")
            for name, address in zip(names, deploy.server_addresses, strict=True)
        ],
        limits=upstream_limits(run),
        rate_per_minute=deploy.rate_per_minute or served_job(run).rate_per_minute,
    )
    monitoring = monitoring_files(
        run, tuple(f"{name}:{port}" for name in names), prometheus=f"prometheus:{_PROMETHEUS_PORT}"
    )
    return {
        "compose.yaml": manifest_text(_escaped(_compose(run, deploy, plan, names))),
        "server/run.yaml": dump_run(_server_run(run, deploy, names)),
        "nginx/nginx.conf": nginx,
        **monitoring,
    }


def _server_run(run: Run, deploy: ComposeDeploy, names: list[str]) -> Run:
    """Return the run of each server: nginx names its clients, and keys come as a secret."""
    inner = container_run(run, names=names)
    job = served_job(inner)
    trusted = tuple(dict.fromkeys((*job.trusted_proxies, deploy.nginx_address)))
    file = f"/run/secrets/{_KEYS}" if job.api_keys_file is not None else None
    return replace(inner, job=replace(job, trusted_proxies=trusted, api_keys_file=file))


def _compose(run: Run, deploy: ComposeDeploy, plan: Plan, names: list[str]) -> dict[str, Any]:
    servers = {
        name: _server(run, deploy, plan, address) for name, address in zip(names, deploy.server_addresses, strict=True)
    }
    files = [path for _, path in keys_path(run)]
    return {
        "name": deploy.object_name(run),
        "services": {
            **servers,
            "nginx": _nginx(deploy, names),
            "prometheus": _prometheus(deploy),
            "grafana": _grafana(deploy),
        },
        "networks": {
            "servers": {"ipam": {"config": [{"subnet": deploy.subnet}]}},
            "monitoring": {},
        },
        "volumes": {"runs": {}, "cache": {}, "prometheus": {}, "grafana": {}},
        **({"secrets": {_KEYS: {"file": files[0]}}} if files else {}),
    }


def _server(run: Run, deploy: ComposeDeploy, plan: Plan, address: str) -> dict[str, Any]:
    job = served_job(run)
    url = f"http://127.0.0.1:{job.port}{READINESS_PATH}"
    ask = f"import urllib.request; urllib.request.urlopen({url!r}, timeout=4)"
    found: dict[str, Any] = {
        "image": deploy.image,
        "command": container_command(deploy),
        **_HARDENED,
        "init": True,
        "tmpfs": ["/tmp"],  # noqa: S108 (in a container)
        "cpus": float(deploy.cpus),
        "mem_limit": deploy.memory_bytes(run, plan),
        "stop_grace_period": f"{round(job.shutdown_grace_s) + _STOP_SLACK_S}s",
        "environment": {"HOME": "/tmp", "HF_HOME": _CACHE_FOLDER},  # noqa: S108 (in a container)
        "volumes": [
            _bind("./server", SNAPSHOT_FOLDER),
            *(_bind(path, path) for path in mounted_paths(run)),
            _volume("runs", RUNS_FOLDER),
            _volume("cache", _CACHE_FOLDER),
        ],
        "networks": {"servers": {"ipv4_address": address}, "monitoring": {}},
        "healthcheck": {
            "test": ["CMD", deploy.python, "-c", ask],
            "interval": "5s",
            "timeout": "5s",
            "retries": 3,
            "start_period": "600s",
        },
    }
    if deploy.gpus:
        devices = [{"driver": "nvidia", "count": deploy.gpus, "capabilities": ["gpu"]}]
        found["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    if job.api_keys_file is not None:
        found["secrets"] = [_KEYS]
    return found


def _nginx(deploy: ComposeDeploy, names: list[str]) -> dict[str, Any]:
    tls = [(deploy.tls_certificate_file, TLS_CERTIFICATE), (deploy.tls_key_file, TLS_KEY)]
    return {
        "image": deploy.nginx_image,
        **_HARDENED,
        "tmpfs": ["/tmp"],  # noqa: S108 (in a container)
        "ulimits": {"nofile": 65536},
        "depends_on": {name: {"condition": "service_started"} for name in names},
        "ports": [_published(deploy.host, deploy.port, INNER_PORT)],
        "volumes": [
            _bind("./nginx/nginx.conf", "/etc/nginx/nginx.conf"),
            *(_bind(path, target) for path, target in tls if path is not None),
        ],
        "networks": {"servers": {"ipv4_address": deploy.nginx_address}},
    }


def _prometheus(deploy: ComposeDeploy) -> dict[str, Any]:
    return {
        "image": deploy.prometheus_image,
        **_HARDENED,
        "ports": [_published("127.0.0.1", deploy.prometheus_port, _PROMETHEUS_PORT)],
        "volumes": [
            _bind("./prometheus.yml", "/etc/prometheus/prometheus.yml"),
            _bind("./rules", "/etc/prometheus/rules"),
            _volume("prometheus", "/prometheus"),
        ],
        "networks": {"monitoring": {}},
    }


def _grafana(deploy: ComposeDeploy) -> dict[str, Any]:
    return {
        "image": deploy.grafana_image,
        **_HARDENED,
        "tmpfs": ["/tmp"],  # noqa: S108 (in a container)
        "environment": {
            "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION": "true",  # else it has a well-known password
            "GF_AUTH_ANONYMOUS_ENABLED": "true",
            "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
            "GF_AUTH_DISABLE_LOGIN_FORM": "true",
            "GF_AUTH_BASIC_ENABLED": "false",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        },
        "ports": [_published("127.0.0.1", deploy.grafana_port, _GRAFANA_PORT)],
        "volumes": [
            _bind("./grafana/provisioning", "/etc/grafana/provisioning"),
            _bind("./grafana/dashboards", "/etc/grafana/dashboards"),
            _volume("grafana", "/var/lib/grafana"),
        ],
        "networks": {"monitoring": {}},
    }


def _bind(source: str, target: str) -> dict[str, Any]:
    # without create_host_path Docker refuses a path that is not there, instead of making an empty folder
    options = {"create_host_path": False}
    return {"type": "bind", "source": source, "target": target, "read_only": True, "bind": options}


def _volume(name: str, target: str) -> dict[str, Any]:
    return {"type": "volume", "source": name, "target": target}


def _published(host: str, port: int, target: int) -> dict[str, Any]:
    return {"target": target, "published": str(port), "host_ip": host, "protocol": "tcp"}


def _escaped(value: Any) -> Any:
    """Return a tree in whose texts Compose replaces no variables."""
    if isinstance(value, dict):
        return {name: _escaped(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    return value.replace("$", "$$") if isinstance(value, str) else value
