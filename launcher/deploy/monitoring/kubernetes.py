"""Monitoring as objects of a cluster with the Prometheus operator."""

from __future__ import annotations

from launcher.backends.kubernetes.manifests import Manifest
from launcher.config.deploy.monitoring import MonitoredDeploy
from launcher.config.run import Run
from launcher.deploy.monitoring.render import dashboard_text
from launcher.deploy.monitoring.rules import rule_groups


def monitoring_manifests(
    run: Run, *, namespace: str, labels: dict[str, str], selector: dict[str, str], port: str
) -> list[Manifest]:
    """Return ServiceMonitor, PrometheusRule and the ConfigMap of the dashboard.

    Args:
        run: the server.
        namespace: of all objects.
        labels: of all objects; Prometheus selects its monitors and rules by them.
        selector: labels of the Service that is scraped.
        port: name of its port.
    """
    deploy = run.deploy
    assert isinstance(deploy, MonitoredDeploy), f"deploy={deploy.kind} is not monitored"
    name = deploy.object_name(run)
    endpoint = {"port": port, "path": "/metrics", "interval": f"{deploy.scrape_every_s}s"}
    monitor = {"selector": {"matchLabels": selector}, "endpoints": [endpoint]}

    def made(api_version: str, kind: str, name: str, *, more: dict[str, str] | None = None) -> Manifest:
        metadata = {"name": name, "namespace": namespace, "labels": {**labels, **(more or {})}}
        return {"apiVersion": api_version, "kind": kind, "metadata": metadata}

    return [
        {**made("monitoring.coreos.com/v1", "ServiceMonitor", name), "spec": monitor},
        {**made("monitoring.coreos.com/v1", "PrometheusRule", name), "spec": {"groups": rule_groups(run)}},
        # Grafana's sidecar, as kube-prometheus-stack installs it, loads every ConfigMap with this label.
        {
            **made("v1", "ConfigMap", f"{name}-dashboard", more={"grafana_dashboard": "1"}),
            "data": {"serving.json": dashboard_text(run)},
        },
    ]
