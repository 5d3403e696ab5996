"""Names, amounts, images and tolerations as Kubernetes accepts them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from launcher.errors import ConfigError
from launcher.utils.text import did_you_mean

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"(?=.{{1,253}}\Z){_LABEL.pattern}(\.{_LABEL.pattern})*")
_QUANTITY = re.compile(r"(?P<number>[1-9][0-9]*)(?P<unit>[kMGT]i?|Ki)?")
_DIGEST = re.compile(r"[^@\s]+@[A-Za-z][A-Za-z0-9]*([+._-][A-Za-z0-9]+)*:[0-9a-fA-F]{32,}")
_HOST = r"(?:[A-Za-z0-9](?:[-.A-Za-z0-9]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_PART = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_IMAGE = re.compile(rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::(?P<tag>\w[\w.-]{{0,127}}))?(?:@.*)?", re.ASCII)
"""An image's name, as registries and container runtimes read it."""
_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_VALUE = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
SCHEMA_PATTERNS = {
    "image": rf"^(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?"
    r"(?:@[A-Za-z][A-Za-z0-9]*(?:[+._-][A-Za-z0-9]+)*:[0-9a-fA-F]{32,})?$",
    "quantity": "^[1-9][0-9]*(?:[kMGT]i?|Ki)?$",
    "name": r"^[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*$",
    "label_key": rf"^(?:[a-z0-9.-]{{1,253}}/)?{_VALUE}$",
    "label_value": rf"^(?:{_VALUE})?$",
}
"""The same rules for JSON schemas, whose regular expressions have fewer operators."""
_TOLERATION_VALUES = {
    "operator": ("Exists", "Equal", "Lt", "Gt"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
}
_TOLERATION_KEYS = ("key", "operator", "value", "effect", "tolerationSeconds")
_KEY_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
GPU = "nvidia.com/gpu"
"""Resource of GPUs, as their device plugin names it."""
NAME_RULE = "lowercase letters, digits and dashes, with a letter or digit at both ends"


def is_label(text: str) -> bool:
    """Whether ``text`` may name a namespace."""
    return _LABEL.fullmatch(text) is not None


def is_service_name(text: str) -> bool:
    """Whether ``text`` may name a Service: a label that begins with a letter."""
    return is_label(text) and text[0].isalpha()


def is_subdomain(text: str) -> bool:
    """Whether ``text`` may name most other things: a claim, a Secret, a service account."""
    return _SUBDOMAIN.fullmatch(text) is not None


def dashed(text: str) -> str:
    """Return ``text`` in the letters of a label, other characters replaced by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def units() -> dict[str, int]:
    """Return the bytes of each unit of a quantity."""
    return {"": 1, **_UNITS}


def toleration_schema() -> dict[str, Any]:
    """Return the JSON schema of a toleration."""
    fields: dict[str, Any] = {name: {"type": "string"} for name in _TOLERATION_KEYS} | {
        "tolerationSeconds": {"type": "integer"}
    }
    fields |= {name: {"enum": list(choices)} for name, choices in _TOLERATION_VALUES.items()}
    return {"type": "object", "properties": fields, "additionalProperties": False}


def parse_quantity(quantity: str) -> int | None:
    """Return the bytes of ``64Gi``; ``None`` for what is not a whole number with a unit."""
    found = _QUANTITY.fullmatch(quantity)
    return int(found["number"]) * _UNITS.get(found["unit"] or "", 1) if found else None


def validate_image(option: str, image: str, *, logins: str) -> Iterator[ConfigError]:
    """Yield why ``image`` names no container image.

    Args:
        option: that holds it.
        image: the value.
        logins: the option that names logins of a registry.
    """
    if "@" in image and not _DIGEST.fullmatch(image):
        why = "is not a valid image: only a digest (sha256:…) may follow the @"  # its value may hold a password
        fix = f"write it like registry/team/launcher:tag; {logins} names logins of a registry"
        yield ConfigError(option, why=why, fix=fix)
    elif not _IMAGE.fullmatch(image):
        fix = "write it like registry/team/launcher:tag, in lowercase up to the tag"
        yield ConfigError(option, image, why="is not a valid image", fix=fix)


def pull_policy(image: str) -> str:
    """Return when a node pulls an image that it has: never, unless its tag moves."""
    found = _IMAGE.fullmatch(image)
    moves = "@" not in image and found is not None and found["tag"] in (None, "latest")
    return "Always" if moves else "IfNotPresent"


def validate_context(option: str, context: str | None) -> Iterator[ConfigError]:
    """Yield that the name of a context of kubectl is empty, which would be the current one."""
    if context is not None and not context.strip():
        fix = f"set {option}=NAME (`kubectl config get-contexts` lists them), or leave it out for the current one"
        yield ConfigError(option, "''", why="is empty", fix=fix)


def validate_interpreter(option: str, python: str) -> Iterator[ConfigError]:
    """Yield that ``python`` is not one program of an image."""
    if not python.strip() or any(letter.isspace() for letter in python):
        why = "is one program of the image, without options"
        yield ConfigError(option, python or "''", why=why, fix=f"set {option}=python3")


def validate_mount(option: str, path: str, *, taken: MutableMapping[str, str]) -> Iterator[ConfigError]:
    """Yield why no volume can be mounted at ``path`` in a pod.

    Args:
        option: that holds it.
        path: the folder in the pod.
        taken: who mounts something there already, by folder; gets this one.
    """
    folder = posixpath.normpath(path)
    if not path.startswith("/"):
        yield ConfigError(option, path, why="pods mount at absolute paths", fix="begin it with /")
    elif folder in ("/", "//"):
        why = "is the root of the image, which a volume would hide"
        yield ConfigError(option, path, why=why, fix="name a folder below it")
    elif ":" in path:
        yield ConfigError(option, path, why="holds a colon, which Kubernetes refuses in it", fix="leave the colon out")
    elif folder in taken:
        why = f"is the folder of {taken[folder]} in every pod, and two volumes cannot share a folder"
        yield ConfigError(option, path, why=why, fix="choose another folder")
    taken.setdefault(folder, option)


def validate_names(group: str, named: Mapping[str, Iterable[str]]) -> Iterator[ConfigError]:
    """Yield the names that Kubernetes refuses.

    Args:
        group: of the options.
        named: the names that each option holds.
    """
    for name, values in named.items():
        for value in values:
            if not is_subdomain(value):
                why = "is not a valid name in Kubernetes"
                yield ConfigError(f"{group}.{name}", value, why=why, fix=f"use {NAME_RULE}, and dots")


def validate_tolerations(option: str, tolerations: Iterable[Mapping[str, Any]]) -> Iterator[ConfigError]:
    """Yield fields and values that no toleration of a pod has."""
    for toleration in tolerations:
        for key in ("key", "value"):
            if key in toleration and not isinstance(toleration[key], str):
                shown = str(toleration[key])
                shown = shown.lower() if isinstance(toleration[key], bool) else shown
                fix = f"write it in quotes: {key}: '{shown}'"
                yield ConfigError(option, shown, why=f"is no text, and the {key} of a toleration is", fix=fix)
        yield from _bad_toleration(option, toleration)
        for key, choices in _TOLERATION_VALUES.items():
            if key in toleration and toleration[key] not in choices:
                why, fix = f"is not a valid {key} of a toleration", did_you_mean(str(toleration[key]), choices)
                yield ConfigError(option, toleration[key], why=why, fix=fix)
        for key in toleration:
            if key not in _TOLERATION_KEYS:
                fix = did_you_mean(key, _TOLERATION_KEYS)
                yield ConfigError(option, key, why="is not a field of a toleration", fix=fix)


def _bad_toleration(option: str, toleration: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Yield a key and a value that no taint has, and seconds that are no number."""
    key, value, seconds = (toleration.get(name) for name in ("key", "value", "tolerationSeconds"))
    if isinstance(key, str) and key and not _is_key(key):
        yield _bad_key(option, key, "taint")
    if isinstance(value, str) and value and not _KEY_NAME.fullmatch(value):
        fix = "use at most 63 letters, digits, dashes, dots and underscores"
        yield ConfigError(option, value, why="is not a valid value of a taint", fix=fix)
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int)):
        fix = "write it like tolerationSeconds: 300"
        yield ConfigError(option, str(seconds), why="is no whole number of seconds", fix=fix)


def validate_keys(option: str, keys: Iterable[str]) -> Iterator[ConfigError]:
    """Yield what is not the key of a label."""
    yield from (_bad_key(option, key, "label") for key in keys if not _is_key(key))


def validate_labels(option: str, labels: Mapping[str, str], *, owned: Mapping[str, str]) -> Iterator[ConfigError]:
    """Yield keys and values that no label has.

    Args:
        option: that holds the labels.
        labels: values by key.
        owned: why a key is not free, by key.
    """
    for key, value in labels.items():
        if key in owned:
            yield ConfigError(option, key, why=f"is not free: {owned[key]}", fix="leave it out")
        elif not _is_key(key):
            yield _bad_key(option, key, "label")
        elif value and not _KEY_NAME.fullmatch(value):
            why, rule = "is not a valid value of a label", "at most 63 letters, digits, dashes, dots and underscores"
            fix = f"use {rule}, with a letter or digit at both ends"
            yield ConfigError(f"{option}.{key}", value, why=why, fix=fix)


def validate_annotations(option: str, annotations: Mapping[str, str]) -> Iterator[ConfigError]:
    """Yield keys that no annotation has; values may be any text."""
    yield from (_bad_key(option, key, "annotation") for key in annotations if not _is_key(key))


def validate_resources(option: str, counts: Mapping[str, int], *, owned: Mapping[str, str]) -> Iterator[ConfigError]:
    """Yield names and counts that no resource of a device plugin has.

    Args:
        option: that holds them.
        counts: devices of a pod by name.
        owned: options that set a resource, by its name.
    """
    for name, count in counts.items():
        if name in owned:
            yield ConfigError(option, name, why=f"is set by {owned[name]}", fix=f"set {owned[name]} instead")
        elif "/" not in name or not _is_key(name) or name.startswith("kubernetes.io/"):
            fix = "write it like rdma/hca_shared_devices_a; kubectl describe node lists those of a node"
            yield ConfigError(option, name, why="is not a resource of a device plugin", fix=fix)
        elif count < 1:
            yield ConfigError(f"{option}.{name}", count, why="must be at least 1", fix=f"set {option}={{{name}: 1}}")


def _is_key(key: str) -> bool:
    """Whether ``key`` is a name, or a DNS name, a slash and a name."""
    prefix, slash, name = key.rpartition("/")
    return (not slash or is_subdomain(prefix)) and _KEY_NAME.fullmatch(name) is not None


def _bad_key(option: str, key: str, what: str) -> ConfigError:
    fix = "write it like team or example.com/team, with at most 63 letters after the slash"
    return ConfigError(option, key, why=f"is not a valid key of {'an' if what[0] in 'aeiou' else 'a'} {what}", fix=fix)
