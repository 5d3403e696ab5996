"""What an API server would say to a manifest, without one: structure, unknown fields, and the rules written in CEL.

Built-in kinds are checked with the schemas that the package kubernetes-validate carries, from the official OpenAPI;
custom ones with the definitions in ``../shared/crds``, where that folder is. Besides, the rules of PodSecurity.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.conftest import REPOSITORY

with warnings.catch_warnings():  # its dependencies use what newer Pythons deprecate
    warnings.simplefilter("ignore")
    import celpy
    from celpy.adapter import json_to_cel

CRDS = next((each / "shared/crds" for each in REPOSITORY.parents if (each / "shared/crds").is_dir()), None)
needs_crds = pytest.mark.skipif(
    CRDS is None, reason="the definitions of custom resources (../shared/crds) are not here"
)
_VERSION = "1.34"
_METADATA = ("name", "namespace", "labels", "annotations")


def problems(manifest: dict[str, Any]) -> list[str]:
    """Return everything wrong with one manifest; nothing of a custom kind where definitions are not here."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    if group in _CUSTOM_GROUPS or ("." in group and not group.endswith(".k8s.io")):
        if CRDS is None:
            return []
        schema = _definition(group, version, manifest["kind"])
        if schema is None:
            return [f"no definition of {manifest['apiVersion']} {manifest['kind']}"]
        return [*_structure(schema, manifest), *_rules(schema, _with_defaults(schema, manifest), "")]
    try:
        kubernetes_validate.validate(manifest, _VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


_CUSTOM_GROUPS = ("gateway.networking.k8s.io",)


@functools.cache
def _definition(group: str, version: str, kind: str) -> dict[str, Any] | None:
    assert CRDS is not None
    for path in sorted(CRDS.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if group not in text or f"kind: {kind}\n" not in text:
            continue
        for crd in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if not crd or crd.get("kind") != "CustomResourceDefinition" or crd["spec"]["group"] != group:
                continue
            for each in crd["spec"]["versions"]:
                if crd["spec"]["names"]["kind"] == kind and each["name"] == version:
                    found: dict[str, Any] = each["schema"]["openAPIV3Schema"]
                    return found
    return None


def _structure(schema: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    whole = _strict(schema)
    whole["properties"].update(apiVersion={"type": "string"}, kind={"type": "string"})
    whole["properties"]["metadata"] = {
        "type": "object",
        "properties": {name: {} for name in _METADATA},
        "additionalProperties": False,
    }
    found = jsonschema.Draft202012Validator(whole).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in found]


def _strict(schema: Any) -> Any:
    """Return a structural schema as JSON schema that refuses unknown fields."""
    if not isinstance(schema, dict):
        return schema
    strict = dict(schema)
    if strict.pop("x-kubernetes-int-or-string", False):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    keeps_unknown = strict.get("x-kubernetes-preserve-unknown-fields") or strict.get("x-kubernetes-embedded-resource")
    if "properties" in strict:
        strict["properties"] = {name: _strict(part) for name, part in strict["properties"].items()}
        if "additionalProperties" not in strict and not keeps_unknown:
            strict["additionalProperties"] = False
    for name in ("items", "additionalProperties"):
        strict[name] = _strict(strict[name]) if name in strict else None
        if strict[name] is None:
            del strict[name]
    if strict.pop("nullable", False) and "type" in strict:
        strict["type"] = [strict["type"], "null"]
    strict.pop("format", None)
    return strict


def _with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """Return a value as the server sees it when it evaluates rules: with the defaults of its schema."""
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        given = {name: field["default"] for name, field in fields.items() if "default" in field} | value
        others = schema.get("additionalProperties")
        rest = others if isinstance(others, dict) else {}
        return {name: _with_defaults(fields.get(name, rest), part) for name, part in given.items()}
    if isinstance(value, list):
        return [_with_defaults(schema.get("items", {}), part) for part in value]
    return value


def _rules(schema: dict[str, Any], value: Any, path: str) -> list[str]:
    """Evaluate the rules where there is data for them; those that compare with an older object do not apply."""
    found = [
        f"{path or '.'}: {rule.get('message', rule['rule'])}"
        for rule in schema.get("x-kubernetes-validations", ())
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value)
    ]
    if isinstance(value, dict):
        for name, part in value.items():
            inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                found += _rules(inner, part, f"{path}.{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            found += _rules(schema.get("items", {}), part, f"{path}[{number}]")
    return found


_ONLY_IN_KUBERNETES = ("undeclared", "no such overload", "no matching overload", "unbound", "not found")


def _holds(rule: str, value: Any) -> bool:
    """Return whether a rule holds; one with functions that only Kubernetes has is taken to hold."""
    environment = celpy.Environment()
    try:
        program = environment.program(environment.compile(rule))
    except celpy.CELParseError:
        return True
    try:
        return bool(program.evaluate({"self": json_to_cel(value)}))
    except celpy.CELEvalError as error:
        if any(word in str(error) for word in _ONLY_IN_KUBERNETES):
            return True
        raise


def unrestricted(pod: dict[str, Any]) -> Iterator[str]:
    """Yield what the level "restricted" of PodSecurity forbids in a pod's spec, by the rules of its documentation."""
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name} is set"
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    allowed.add("image")
    for volume in pod.get("volumes", ()):
        if not allowed.issuperset(set(volume) - {"name"}):
            yield f"volume {volume['name']} is of another kind"
    outer = pod.get("securityContext", {})
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        name, inner = container["name"], container.get("securityContext", {})
        if inner.get("privileged"):
            yield f"{name} is privileged"
        if inner.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may gain privileges"
        if "ALL" not in inner.get("capabilities", {}).get("drop", ()):
            yield f"{name} keeps capabilities"
        if set(inner.get("capabilities", {}).get("add", ())) - {"NET_BIND_SERVICE"}:
            yield f"{name} adds capabilities"
        if not inner.get("runAsNonRoot", outer.get("runAsNonRoot")):
            yield f"{name} may run as root"
        if inner.get("runAsUser", outer.get("runAsUser")) == 0:
            yield f"{name} runs as root"
        profile = inner.get("seccompProfile", outer.get("seccompProfile", {})).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            yield f"{name} has no seccomp profile"
        if any("hostPort" in port for port in container.get("ports", ())):
            yield f"{name} takes a port of its node"
