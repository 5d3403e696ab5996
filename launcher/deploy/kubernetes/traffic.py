"""Routes to the versions of a server: Istio's, or an HTTPRoute of the Gateway API."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from launcher.backends.kubernetes.manifest_parts import Manifest
from launcher.deploy.kubernetes.server import VERSION_LABEL, Server

ROUTES = {
    "istio": ("virtualservices.networking.istio.io", "virtualservice.yaml"),
    "gateway": ("httproutes.gateway.networking.k8s.io", "httproute.yaml"),
}
"""Resource, and file of the manifest, that hold the weights of each ``deploy.traffic``."""
_RETRIES = 2


def traffic_manifests(server: Server) -> list[Manifest]:
    """Return the routes, if there are any."""
    match server.deploy.traffic:
        case "istio":
            return [destination_rule(server), virtual_service(server)]
        case "gateway":
            return [http_route(server)]
        case _:
            return []


def destination_rule(server: Server) -> Manifest:
    """Return a subset of pods for each version, and how one of them is chosen."""
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": server.shared_metadata(),
        "spec": {
            "host": _service_host(server),
            "trafficPolicy": {
                "loadBalancer": {"simple": "LEAST_REQUEST"},
                "outlierDetection": {
                    "consecutiveGatewayErrors": 5,
                    "interval": "10s",
                    "baseEjectionTime": "30s",
                    "maxEjectionPercent": 50,
                },
            },
            "subsets": [{"name": version, "labels": {VERSION_LABEL: version}} for version in server.deploy.shares],
        },
    }


def virtual_service(server: Server) -> Manifest:
    """Return the weights of the versions; only what was not sent is sent again."""
    deploy = server.deploy
    routes = [
        {"destination": {"host": _service_host(server), "subset": version}, "weight": share}
        for version, share in deploy.shares.items()
    ]
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": server.shared_metadata(),
        "spec": {
            "hosts": list(deploy.hostnames),
            "gateways": [deploy.gateway],
            "http": [
                {
                    "route": routes,
                    "timeout": f"{_timeout_s(server)}s",
                    "retries": {"attempts": _RETRIES, "retryOn": "connect-failure,refused-stream"},
                }
            ],
        },
    }


def http_route(server: Server) -> Manifest:
    """Return the weights of the versions; each has a Service of its own."""
    deploy = server.deploy
    namespace, _, name = (deploy.gateway or "").rpartition("/")
    parent = {"name": name, **({"namespace": namespace} if namespace else {})}
    backends = [
        {"name": server.name_of(version), "port": deploy.service_port, "weight": share}
        for version, share in deploy.shares.items()
    ]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": server.shared_metadata(),
        "spec": {
            "parentRefs": [parent],
            **({"hostnames": list(deploy.hostnames)} if deploy.hostnames else {}),
            "rules": [{"backendRefs": backends, "timeouts": {"request": f"{_timeout_s(server)}s"}}],
        },
    }


def _service_host(server: Server) -> str:
    return f"{server.name}.{server.deploy.namespace}.svc.cluster.local"


def _timeout_s(server: Server) -> int:
    """Return the seconds after which the server itself has answered, with an error if need be."""
    return math.ceil(server.job.request_timeout_s) + 5


def route_shares(route: Manifest, name: str) -> dict[str, int]:
    """Return the weight of each version in a route; empty without a route.

    Args:
        route: VirtualService or HTTPRoute.
        name: of what all versions share.
    """
    # the Gateway API's default is 1, Istio's 0 beside others
    default = 1 if route.get("kind") == "HTTPRoute" else 0
    return {version: int(target.get("weight", default)) for version, target in route_targets(route, name)}


def route_targets(route: Manifest, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield version and entry of each destination of a route; arguments as for ``route_shares``."""
    spec = route.get("spec", {})
    if route.get("kind") == "HTTPRoute":
        for rule in spec.get("rules", ()):
            for target in rule.get("backendRefs", ()):
                yield target["name"].removeprefix(f"{name}-"), target
        return
    for rule in spec.get("http", ()):
        for target in rule.get("route", ()):
            yield target["destination"].get("subset", ""), target
