"""Every manifest of ``deploy=kubernetes``, one file each, in the folder ``manifests``."""

from __future__ import annotations

from launcher.backends.kubernetes.manifest_parts import Manifest, manifest_text
from launcher.config.run import Run
from launcher.deploy.kubernetes.autoscaling import autoscaling_manifests
from launcher.deploy.kubernetes.server import PORT_NAME, VERSION_LABEL, Server
from launcher.deploy.kubernetes.traffic import traffic_manifests
from launcher.deploy.kubernetes.workload import workload_manifests
from launcher.deploy.monitoring.kubernetes import monitoring_manifests
from launcher.protocol.plan import Plan

FOLDER = "manifests"


def render(run: Run, plan: Plan) -> dict[str, str]:
    """Return the text of each manifest by its path."""
    return {f"{FOLDER}/{file_name(manifest)}": manifest_text(manifest) for manifest in manifests(run, plan)}


def manifests(run: Run, plan: Plan) -> list[Manifest]:
    """Return every object of the server, in the order in which they are applied."""
    server = Server(run, plan)
    found = [*workload_manifests(server), *autoscaling_manifests(server), *traffic_manifests(server)]
    if server.deploy.monitoring:
        # Not the Services of one version, which have the same pods.
        of_all = [{"key": VERSION_LABEL, "operator": "DoesNotExist"}]
        services = {"matchLabels": server.shared_labels, "matchExpressions": of_all}
        metadata = server.shared_metadata()
        found += monitoring_manifests(
            run, metadata=metadata, services=services, port=PORT_NAME, pod_labels=(VERSION_LABEL,)
        )
    return found


def file_name(manifest: Manifest) -> str:
    """Return the name of a manifest's file: its kind, and its name where there are several."""
    kind = manifest["kind"].lower()
    name: str = manifest["metadata"]["name"]
    is_one_of_several = kind == "service" or name.endswith("-dashboard")
    return f"{kind}-{name}.yaml" if is_one_of_several else f"{kind}.yaml"
