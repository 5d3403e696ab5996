"""What an API server would say to a manifest, without one: structure, unknown fields, and the rules written in CEL.

Built-in kinds are checked with the schemas that the package kubernetes-validate carries, from the official OpenAPI;
custom ones with the schemas in ``crds/``.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

with warnings.catch_warnings():  # its dependencies use what newer Pythons deprecate
    warnings.simplefilter("ignore")
    import celpy
    from celpy.adapter import json_to_cel

_CRDS = Path(__file__).parent / "crds"
_VERSION = "1.31"
_METADATA = ("name", "namespace", "labels", "annotations")


def problems(manifest: dict[str, Any]) -> list[str]:
    """Return everything wrong with one manifest."""
    custom = {(crd["apiVersion"], crd["kind"]): crd["openAPIV3Schema"] for crd in map(_read, _CRDS.glob("*.json"))}
    schema = custom.get((manifest["apiVersion"], manifest["kind"]))
    if schema is not None:
        return [*_structure(schema, manifest), *_rules(schema, manifest, "")]
    try:
        kubernetes_validate.validate(manifest, _VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _structure(schema: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    whole = _strict(schema)
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


def _holds(rule: str, value: Any) -> bool:
    environment = celpy.Environment()
    return bool(environment.program(environment.compile(rule)).evaluate({"self": json_to_cel(value)}))
