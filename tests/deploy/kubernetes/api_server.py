"""An API server in memory, for the real kubectl: discovery, objects, and the checks of ``tests.kubernetes_schemas``.

A workload that is applied is ready at once, unless ``are_ready`` says otherwise.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.kubernetes_schemas import problems

RESOURCES = {
    "": {"serviceaccounts": "ServiceAccount", "configmaps": "ConfigMap", "services": "Service", "pods": "Pod"},
    "apps": {"deployments": "Deployment", "statefulsets": "StatefulSet"},
    "policy": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io": {"networkpolicies": "NetworkPolicy"},
    "autoscaling": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "keda.sh": {"scaledobjects": "ScaledObject"},
    "networking.istio.io": {"destinationrules": "DestinationRule", "virtualservices": "VirtualService"},
    "gateway.networking.k8s.io": {"httproutes": "HTTPRoute"},
    "monitoring.coreos.com": {"servicemonitors": "ServiceMonitor", "prometheusrules": "PrometheusRule"},
}
VERSIONS = {"keda.sh": "v1alpha1", "autoscaling": "v2"}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


@dataclass
class ApiServer:
    """What the server holds, and what it was asked."""

    address: str = ""
    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """Objects by plural and name."""
    writes: list[str] = field(default_factory=list)
    """Requests that changed something, or would have without ``dryRun``."""
    are_ready: bool = True
    revision: int = 0
    """Number of writes: the newest one's is the revision of its object."""


@contextmanager
def serving() -> Iterator[ApiServer]:
    """Serve until the end of the block."""
    state = ApiServer()

    class Handler(_Handler):
        api = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


class _Handler(BaseHTTPRequestHandler):
    api: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer discovery, an object or a list."""
        url = urlsplit(self.path)
        found = _discovery(url.path)
        if found is not None:
            self._send(200, found)
            return
        plural, name = self._place(url.path)
        if not any(plural in kinds for kinds in RESOURCES.values()):
            self._refuse(404, "NotFound", f"no such path: {url.path}")
            return
        if name:
            entry = self.api.objects.get((plural, name))
            self._send(200, entry) if entry else self._refuse(404, "NotFound", f'{plural} "{name}" not found')
            return
        query = parse_qs(url.query)
        wanted = dict(each.split("=") for text in query.get("labelSelector", ()) for each in text.split(","))
        names = [each.partition("=")[2] for each in query.get("fieldSelector", ())]
        items = [
            item
            for (kind, _), item in sorted(self.api.objects.items())
            if kind == plural
            and wanted.items() <= item["metadata"].get("labels", {}).items()
            and (not names or item["metadata"]["name"] in names)
        ]
        group, kind = _kind(plural)
        head = {"apiVersion": _version(group), "kind": f"{kind}List", "metadata": {"resourceVersion": "1"}}
        if "watch" in query:
            self._send(200, {})
            return
        self._send(200, {**head, "items": items})

    def do_POST(self) -> None:
        """Create an object."""
        url = urlsplit(self.path)
        plural, _ = self._place(url.path)
        self._store(plural, self._body(), url.query, 201)

    def do_PATCH(self) -> None:
        """Merge a patch into an object; a server-side apply replaces it."""
        url = urlsplit(self.path)
        plural, name = self._place(url.path)
        patch = self._body()
        is_apply = "apply" in self.headers["Content-Type"]
        old = {} if is_apply else self.api.objects[plural, name]
        self._store(plural, _merged(copy.deepcopy(old), patch), url.query, 200)

    def do_DELETE(self) -> None:
        """Delete an object, or those with certain labels."""
        url = urlsplit(self.path)
        plural, name = self._place(url.path)
        self._body()
        if name and (plural, name) not in self.api.objects:
            self._refuse(404, "NotFound", f'{plural} "{name}" not found')
            return
        self.api.writes.append(f"DELETE {plural}/{name}")
        del self.api.objects[plural, name]
        self._send(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _store(self, plural: str, manifest: dict[str, Any], query: str, code: int) -> None:
        _, kind = _kind(plural)
        name = manifest["metadata"]["name"]
        bare = copy.deepcopy(manifest)
        bare.pop("status", None)
        bare["metadata"] = {key: bare["metadata"][key] for key in _META if key in bare["metadata"]}
        if wrong := problems(bare):
            self._refuse(422, "Invalid", f"{kind} {name} is invalid: {wrong}")
            return
        dry = "dryRun=All" in query
        self.api.writes.append(f"{'dry ' if dry else ''}{self.command} {plural}/{name}")
        old = self.api.objects.get((plural, name))
        if kind in ("Deployment", "StatefulSet"):  # what is not applied stays as an autoscaler set it
            replicas = old["spec"]["replicas"] if old else 1
            for each in (bare, manifest):
                each["spec"].setdefault("replicas", replicas)
        generation = old["metadata"]["generation"] + 1 if old else 1
        if old and all(old.get(key) == value for key, value in bare.items() if key not in ("metadata", "status")):
            generation -= 1  # nothing changes
        given = manifest["metadata"].get("resourceVersion")
        if given is not None and given != (old or {"metadata": {}})["metadata"].get("resourceVersion"):
            self._refuse(409, "Conflict", f'Operation cannot be fulfilled on {plural} "{name}": it has been modified')
            return
        if dry:  # nothing gets a new version
            revision = old["metadata"]["resourceVersion"] if old else ""
        else:
            self.api.revision += 1
            revision = str(self.api.revision)
        numbers = {"resourceVersion": revision, "generation": generation}
        manifest["metadata"] |= {"uid": f"{plural}-{name}", **numbers}
        if kind in ("Deployment", "StatefulSet"):
            replicas = manifest["spec"]["replicas"]
            ready = replicas if self.api.are_ready else 0
            status = dict.fromkeys(("replicas", "updatedReplicas"), replicas)
            status |= dict.fromkeys(("readyReplicas", "availableReplicas"), ready)
            manifest["status"] = {"observedGeneration": generation, **status}
        if not dry:
            self.api.objects[plural, name] = manifest
        self._send(code, manifest)

    def _place(self, path: str) -> tuple[str, str]:
        """Return plural and name of a path; the name is empty for a list."""
        parts = path.strip("/").split("/")
        at = parts.index("namespaces") + 2 if "namespaces" in parts else len(parts) - 1
        plural, *name = parts[at:]
        return plural, name[0] if name else ""

    def _body(self) -> dict[str, Any]:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found: dict[str, Any] = yaml.safe_load(data) if data else {}
        return found

    def _refuse(self, code: int, reason: str, message: str) -> None:
        head = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        self._send(code, {**head, "reason": reason, "code": code, "message": message})

    def _send(self, code: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


_META = ("name", "namespace", "labels", "annotations")


def _version(group: str) -> str:
    return f"{group}/{VERSIONS.get(group, 'v1')}" if group else "v1"


def _kind(plural: str) -> tuple[str, str]:
    return next((group, kinds[plural]) for group, kinds in RESOURCES.items() if plural in kinds)


def _merged(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict) or not isinstance(old, dict):
        return patch
    changed = dict(old)
    for key, value in patch.items():
        if key.startswith("$"):
            continue
        if value is None:
            changed.pop(key, None)
        else:
            changed[key] = _merged(changed.get(key, {}), value)
    return changed


def _discovery(path: str) -> Any:
    """Return what describes the server; ``None`` for the path of an object."""
    match path.strip("/").split("/"):
        case ["version"]:
            return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        case ["apis"]:
            groups = []
            for group in filter(None, RESOURCES):
                version = {"groupVersion": _version(group), "version": VERSIONS.get(group, "v1")}
                groups.append({"name": group, "versions": [version], "preferredVersion": version})
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        case ["api", "v1"]:
            return _resource_list("")
        case ["apis", group, _] if group in RESOURCES:
            return _resource_list(group)
        case ["openapi", "v3"]:
            places = [f"apis/{_version(group)}" if group else "api/v1" for group in RESOURCES]
            return {"paths": {place: {"serverRelativeURL": f"/openapi/v3/{place}"} for place in places}}
        case ["openapi", "v3", *place]:
            return _openapi(place[1] if place[0] == "apis" else "")
        case _:
            return None


def _resource_list(group: str) -> dict[str, Any]:
    listed = [
        {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": VERBS}
        for plural, kind in RESOURCES[group].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": _version(group), "resources": listed}


def _openapi(group: str) -> dict[str, Any]:
    """Return the least from which kubectl learns that the server itself validates and makes dry runs."""
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in ("dryRun", "fieldValidation")]
    base, paths = f"/apis/{_version(group)}" if group else "/api/v1", {}
    for plural, kind in RESOURCES[group].items():
        patch = {
            "parameters": parameters,
            "responses": {"200": {"description": "OK"}},
            "x-kubernetes-group-version-kind": {"group": group, "version": VERSIONS.get(group, "v1"), "kind": kind},
        }
        paths[f"{base}/namespaces/{{namespace}}/{plural}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.34.0"}, "paths": paths}
