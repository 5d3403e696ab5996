"""``deploy=monitoring``: files for a Prometheus and a Grafana."""

from __future__ import annotations

import json
from typing import Any

from launcher.backends.kubernetes.manifest_parts import manifest_text
from launcher.config.deploy.monitoring import MonitoredDeploy, MonitoringDeploy
from launcher.config.job.train import Train
from launcher.config.run import Run
from launcher.deploy.monitoring.dashboards import dashboard
from launcher.deploy.monitoring.rules import rule_groups
from launcher.protocol.plan import Plan

DATA_SOURCE = "prometheus"
"""Name and uid of Grafana's data source."""


def render(run: Run, plan: Plan) -> dict[str, str]:
    """Return the files for a Prometheus and a Grafana that run as programs of their own."""
    deploy = run.deploy
    assert isinstance(deploy, MonitoringDeploy), "the registry maps this kind alone to this module"
    return monitoring_files(run, deploy.targets_of(run), alertmanagers=deploy.alertmanagers)


def monitoring_files(
    run: Run, targets: tuple[str, ...], *, alertmanagers: tuple[str, ...] = (), prometheus: str = "localhost:9090"
) -> dict[str, str]:
    """Return configuration, rules and dashboards by path.

    Args:
        run: whose metrics are scraped.
        targets: addresses to scrape, ``host:port``.
        alertmanagers: addresses that get the alerts.
        prometheus: where Grafana finds Prometheus.
    """
    name = _title(run)
    return {
        "prometheus.yml": manifest_text(prometheus_config(run, targets, alertmanagers=alertmanagers)),
        f"rules/{name}.yml": manifest_text({"groups": rule_groups(run)}),
        f"grafana/dashboards/{name}.json": dashboard_text(run),
        "grafana/provisioning/dashboards/launcher.yaml": manifest_text(_dashboard_provider()),
        "grafana/provisioning/datasources/prometheus.yaml": manifest_text(
            _data_source(f"http://{prometheus}", scrape_every_s=monitored(run).scrape_every_s)
        ),
    }


def prometheus_config(run: Run, targets: tuple[str, ...], *, alertmanagers: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return Prometheus' configuration."""
    deploy = monitored(run)
    every = f"{deploy.scrape_every_s}s"
    found: dict[str, Any] = {
        "global": {"scrape_interval": every, "evaluation_interval": every},
        "rule_files": ["rules/*.yml"],
    }
    if alertmanagers:
        found["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": list(alertmanagers)}]}]}
    scraped = {"job_name": deploy.object_name(run), "static_configs": [{"targets": list(targets)}]}
    return {**found, "scrape_configs": [scraped]}


def dashboard_text(run: Run) -> str:
    """Return the dashboard as the file that Grafana imports."""
    return json.dumps(dashboard(run), indent=2, ensure_ascii=False) + "\n"


def monitored(run: Run) -> MonitoredDeploy:
    """Return the options of monitoring."""
    assert isinstance(run.deploy, MonitoredDeploy), f"deploy={run.deploy.kind} is not monitored"
    return run.deploy


def _title(run: Run) -> str:
    return "training" if isinstance(run.job, Train) else "serving"


def _dashboard_provider() -> dict[str, Any]:
    options = {"path": "/etc/grafana/dashboards"}
    provider = {"name": "launcher", "type": "file", "allowUiUpdates": True, "options": options}
    return {"apiVersion": 1, "providers": [provider]}


def _data_source(url: str, *, scrape_every_s: int) -> dict[str, Any]:
    source = {"name": DATA_SOURCE, "uid": DATA_SOURCE, "type": "prometheus", "access": "proxy", "url": url}
    settings = {"isDefault": True, "jsonData": {"timeInterval": f"{scrape_every_s}s"}}
    return {"apiVersion": 1, "datasources": [{**source, **settings}]}
