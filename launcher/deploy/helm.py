"""``deploy=helm``: the manifests of ``deploy=kubernetes`` as templates with values.

With the values of the chart ``helm template`` prints exactly these manifests, in the namespace of the release.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import launcher
from launcher.backends.kubernetes.manifest_parts import Manifest, manifest_text
from launcher.config.component import field_docs
from launcher.config.deploy.helm import VALUES, HelmDeploy
from launcher.config.kubernetes_objects import SCHEMA_PATTERNS, parse_quantity, toleration_schema, units
from launcher.config.run import Run
from launcher.deploy.kubernetes.render import file_name, manifests
from launcher.deploy.kubernetes.server import Server
from launcher.protocol.plan import Plan
from launcher.utils.schema import field_types
from launcher.utils.text import bytes_text

FOLDER = "chart"
_OPEN, _CLOSE = "\x02", "\x03"
"""Around the name of a value in a manifest: no option holds such characters."""
_NAMESPACE = "launcher-namespace-of-the-release"
"""Namespace of the manifests that become templates: nothing else is called so."""
_CHECKS = f"{FOLDER}/templates/checks.yaml"
_OPTIONAL = {
    "nodeSelector": ("node_selector", "toJson ."),
    "tolerations": ("tolerations", "toJson ."),
    "imagePullSecrets": ("image_pull_secrets", ""),
}
"""Parts of a pod that may be empty and are then left out, with value and template."""


def render(run: Run, plan: Plan) -> dict[str, str]:
    """Return the text of each file of the chart by its path."""
    server = Server(run, plan)
    values = chart_values(server)
    chart = {
        "apiVersion": "v2",
        "name": server.name,
        "description": f"A server of {server.job.name_of(run)}, rendered by launch deploy",
        "type": "application",
        "version": launcher.__version__,
        "appVersion": server.snapshot[1][:10],
        "kubeVersion": ">=1.30.0-0",  # the sleep of preStop
    }
    marked = Server(replace(run, deploy=replace(server.deploy, namespace=_NAMESPACE)), plan)
    templates = {
        f"{FOLDER}/templates/{file_name(each)}": _in_namespace(_template(each, marked), marked, server)
        for each in manifests(marked.run, plan)
    }
    return {
        f"{FOLDER}/Chart.yaml": manifest_text(chart),
        f"{FOLDER}/values.yaml": _commented(values),
        f"{FOLDER}/values.schema.json": json.dumps(values_schema(server, values), indent=2, ensure_ascii=False) + "\n",
        _CHECKS: _checks(server, values),
        **templates,
    }


def chart_values(server: Server) -> dict[str, Any]:
    """Return the values of the chart: options of the group deploy by name."""
    deploy = server.deploy
    is_scaled = deploy.autoscaling != "none"
    unused = {"replicas"} if is_scaled else {"min_replicas", "max_replicas"}
    own: dict[str, Any] = {"image": deploy.server_image(server.run), "memory": server.memory}
    values = {name: own.get(name, getattr(deploy, name)) for name in VALUES if name not in unused}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def values_schema(server: Server, values: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of the values: what the dataclass refuses of one value alone."""
    hints, docs = field_types(HelmDeploy), field_docs(HelmDeploy)
    properties = {}
    for name in values:
        schema = {"description": _meaning(docs[name]), **_schema_of(hints[name])}
        if name in HelmDeploy.minimums:
            schema["minimum"] = HelmDeploy.minimums[name]
        properties[name] = schema
    properties["memory"]["pattern"] = SCHEMA_PATTERNS["quantity"]
    properties["image"] |= {"minLength": 1, "pattern": SCHEMA_PATTERNS["image"]}
    properties["image_pull_secrets"]["items"] |= {"pattern": SCHEMA_PATTERNS["name"], "maxLength": 253}
    properties["node_selector"]["propertyNames"] = {"pattern": SCHEMA_PATTERNS["label_key"]}
    properties["node_selector"]["additionalProperties"]["pattern"] = SCHEMA_PATTERNS["label_value"]
    properties["tolerations"]["items"] = toleration_schema()
    properties["service_port"] |= {"minimum": 1, "maximum": 65535}
    if "min_replicas" in properties and server.deploy.queue_query is None:
        properties["min_replicas"]["minimum"] = 1  # nothing would start the first pod
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean"}


def _schema_of(hint: Any) -> dict[str, Any]:
    """Return the JSON schema of a type of an option."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema_of(each) for each in arguments]}
    if origin is tuple:
        return {"type": "array", "items": _schema_of(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1])}
    return {"type": _PLAIN[hint]}


def _commented(values: dict[str, Any]) -> str:
    """Return values.yaml, each value below what it means."""
    docs = field_docs(HelmDeploy)
    return "\n".join(f"# {_meaning(docs[name])}.\n{manifest_text({name: value})}" for name, value in values.items())


def _meaning(text: str) -> str:
    """Return the first clause about an option: others speak of its values in the launcher."""
    return text.partition(". ")[0].partition("; ")[0].removesuffix(".")


def _checks(server: Server, values: dict[str, Any]) -> str:
    """Return a template that prints nothing, and fails on values that do not fit."""
    lines = ["{{- /* What the schema of the values cannot compare. */}}"]
    if "min_replicas" in values:
        lines += [
            "{{- if gt (int64 .Values.min_replicas) (int64 .Values.max_replicas) }}",
            '{{- fail (printf "min_replicas=%v is more than max_replicas=%v" '
            ".Values.min_replicas .Values.max_replicas) }}",
            "{{- end }}",
        ]
    needed = server.deploy.needed_bytes(server.run, server.plan) or 0
    least = max(needed, (parse_quantity(server.deploy.shared_memory) or 0) + 1)
    by_unit = " ".join(f'"{unit}" {num_bytes}' for unit, num_bytes in units().items())
    return "\n".join(
        [
            *lines,
            '{{- $unit := regexReplaceAll "^[0-9]+" .Values.memory "" }}',
            '{{- $number := regexFind "^[0-9]+" .Values.memory }}',
            f"{{{{- if lt (mul (int64 $number) (int64 (get (dict {by_unit}) $unit))) (int64 {least}) }}}}",
            '{{- fail (printf "memory=%s is less than the server needs: '
            f'{bytes_text(least)} of weights, KV cache, processes and shared memory" .Values.memory) }}}}',
            "{{- end }}",
            "",
        ]
    )


def _in_namespace(text: str, marked: Server, server: Server) -> str:
    """Return a template of a marked server whose namespace is that of the release.

    The hash in names stays that of the server itself.
    """
    for found, own in ((marked.snapshot[1], server.snapshot[1]), (marked.config_name, server.config_name)):
        text = text.replace(found, own)
    whole = re.compile(rf": {_NAMESPACE}$", re.MULTILINE)  # quoted: a namespace may look like a number
    text = whole.sub(": {{ .Release.Namespace | toJson }}", text)
    return text.replace(_NAMESPACE, "{{ .Release.Namespace }}")


def _template(manifest: Manifest, server: Server) -> str:
    """Return a manifest as a template, its parts that are values replaced."""
    text = manifest_text(_with_values(manifest, server)).replace("{{", '{{ "{{" }}')
    lines = list(_expanded(text.splitlines()))
    return "\n".join(lines) + "\n"


def _value(name: str) -> str:
    return f"{_OPEN}{name}{_CLOSE}"


def _with_values(manifest: Manifest, server: Server) -> Manifest:
    """Return a manifest with marks in place of values."""
    changed: Manifest = json.loads(json.dumps(manifest))  # nothing is shared with the manifest itself
    spec = changed.get("spec", {})
    match changed["kind"]:
        case "Deployment" | "StatefulSet":
            if "replicas" in spec:
                spec["replicas"] = _value("replicas")
            _mark_pod(spec["template"]["spec"], server)
        case "Service":
            spec["ports"][0]["port"] = _value("service_port")
        case "HTTPRoute":
            for backend in spec["rules"][0]["backendRefs"]:
                backend["port"] = _value("service_port")
        case "PodDisruptionBudget":
            spec["maxUnavailable"] = _value("max_unavailable")
        case "HorizontalPodAutoscaler":
            spec |= {"minReplicas": _value("min_replicas"), "maxReplicas": _value("max_replicas")}
        case "ScaledObject":
            spec |= {"minReplicaCount": _value("min_replicas"), "maxReplicaCount": _value("max_replicas")}
    return changed


def _mark_pod(pod: Manifest, server: Server) -> None:
    image = server.deploy.server_image(server.run)
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        if container["image"] == image:
            container["image"] = _value("image")
    resources = pod["containers"][0]["resources"]
    for amounts in resources.values():
        amounts["memory"] = _value("memory")
    for name, (value, _) in _OPTIONAL.items():
        pod[name] = _value(value)


def _expanded(lines: list[str]) -> Iterator[str]:
    """Yield the lines of a template: marks become actions, optional parts conditions."""
    for line in lines:
        if _OPEN not in line and "\\x02" not in line:
            yield line
            continue
        key, _, rest = line.partition(": ")
        name = rest.strip("'\"").replace("\\x02", "").replace("\\x03", "").strip(_OPEN + _CLOSE)
        optional = next((text for part, (value, text) in _OPTIONAL.items() if key.strip() == part), None)
        if optional is None:
            yield f"{key}: {{{{ .Values.{name} | toJson }}}}"
            continue
        indent = key[: len(key) - len(key.lstrip())]
        yield f"{indent}{{{{- with .Values.{name} }}}}"
        if optional:
            yield f"{key}: {{{{ {optional} }}}}"
        else:
            yield f"{key}:"
            yield f"{indent}{{{{- range . }}}}"
            yield f"{indent}- name: {{{{ toJson . }}}}"
            yield f"{indent}{{{{- end }}}}"
        yield f"{indent}{{{{- end }}}}"
