"""Every manifest of ``deploy=kubernetes``, one file each, in the folder ``manifests``."""

from __future__ import annotations

from launcher.backends.kubernetes.manifests import Manifest, manifest_text
from launcher.config.run import Run
from launcher.deploy.kubernetes.autoscaling import autoscaling_manifests
from launcher.deploy.kubernetes.server import Server
from launcher.deploy.kubernetes.traffic import traffic_manifests
from launcher.deploy.kubernetes.workload import workload_manifests
from launcher.protocol.plan import Plan

FOLDER = "manifests"


def render(run: Run, plan: Plan) -> dict[str, str]:
    """Return the text of each manifest by its path."""
    return {f"{FOLDER}/{file_name(manifest)}": manifest_text(manifest) for manifest in manifests(run, plan)}


def manifests(run: Run, plan: Plan) -> list[Manifest]:
    """Return every object of the server, in the order in which they are applied."""
    server = Server(run, plan)
    return [*workload_manifests(server), *autoscaling_manifests(server), *traffic_manifests(server)]


def file_name(manifest: Manifest) -> str:
    """Return the name of a manifest's file: its kind, and its name where there are several."""
    kind = manifest["kind"].lower()
    return f"{kind}-{manifest['metadata']['name']}.yaml" if kind == "service" else f"{kind}.yaml"
