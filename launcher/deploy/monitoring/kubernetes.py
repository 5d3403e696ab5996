"""Monitoring as objects of a cluster with the Prometheus operator."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.backends.kubernetes.manifest_parts import Manifest
from launcher.config.run import Run
from launcher.deploy.monitoring.render import dashboard_text, monitored
from launcher.deploy.monitoring.rules import rule_groups

_API = "monitoring.coreos.com/v1"


def monitoring_manifests(
    run: Run, *, metadata: Manifest, services: Manifest, port: str, pod_labels: Sequence[str]
) -> list[Manifest]:
    """Return ServiceMonitor, PrometheusRule and the ConfigMap of the dashboard.

    Args:
        run: the server.
        metadata: of all objects.
        services: selector of the Service whose pods are scraped; its name becomes the label ``job``.
        port: name of its port.
        pod_labels: labels of pods that metrics get.
    """
    endpoint = {"port": port, "path": "/metrics", "interval": f"{monitored(run).scrape_every_s}s"}
    spec = {"selector": services, "podTargetLabels": list(pod_labels), "endpoints": [endpoint]}
    # Grafana's sidecar, as kube-prometheus-stack installs it, loads every ConfigMap with this label.
    labels = {**metadata["labels"], "grafana_dashboard": "1"}
    dashboard = {**metadata, "name": f"{metadata['name']}-dashboard", "labels": labels}
    return [
        {"apiVersion": _API, "kind": "ServiceMonitor", "metadata": metadata, "spec": spec},
        {"apiVersion": _API, "kind": "PrometheusRule", "metadata": metadata, "spec": {"groups": rule_groups(run)}},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": dashboard,
            "data": {f"{metadata['name']}.json": dashboard_text(run)},
        },
    ]
