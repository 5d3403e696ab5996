"""What manifests of runs and of servers share: restricted pods, resources, volumes, YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.config.kubernetes_objects import GPU

Manifest = dict[str, Any]
TMP_FOLDER = "/tmp"  # noqa: S108 (in a pod, whose root is read only)
_NUMBER = re.compile(r"[-+.]?[0-9._][0-9a-f._:,+\-xotz ]*", re.IGNORECASE)
"""Numbers and times of YAML: ``1e3``, ``0o17``, ``.5e1``, ``1_000``, ``12:30:45``."""
_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", "~", "=", "<<"))
_NO_NUMBERS = frozenset(f"{sign}{word}" for sign in ("", "+", "-") for word in (".inf", ".nan", "inf", "nan"))


def escape_references(word: str) -> str:
    """Return ``word`` escaped: Kubernetes expands ``$(NAME)`` and turns ``$$`` into ``$``."""
    return word.replace("$", "$$")


def pod_security(*, user: int, group: int | None = None) -> Manifest:
    """Return the ``securityContext`` of a pod.

    Args:
        user: id of the user; 0 is root, which restricted namespaces refuse.
        group: id of the group, which owns the files of volumes; ``None`` is that of the user.
    """
    group = user if group is None else group
    return {
        "runAsNonRoot": user != 0,
        "runAsUser": user,
        "runAsGroup": group,
        "fsGroup": group,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security(*, capabilities: Sequence[str] = ()) -> Manifest:
    """Return the ``securityContext`` of a container without privileges.

    Nothing of its image can be written.

    Args:
        capabilities: added to none; a restricted namespace refuses all of them.
    """
    added = {"add": list(capabilities)} if capabilities else {}
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"], **added},
        "readOnlyRootFilesystem": True,
    }


def resources(*, cpus: int, memory: str, gpus: int = 0, more: Mapping[str, int] | None = None) -> Manifest:
    """Return the ``resources`` of a container, reserved for it alone: requests equal limits."""
    amounts = {"cpu": str(cpus), "memory": memory}
    if gpus:
        amounts[GPU] = str(gpus)
    amounts |= {name: str(count) for name, count in (more or {}).items()}
    return {"requests": amounts, "limits": amounts.copy()}


def folder_variables(folder: str) -> dict[str, str]:
    """Return the variables that have libraries write below ``folder``."""
    return {
        "HOME": folder,
        "USER": "launcher",  # a user id without an entry in /etc/passwd has no name
        "HF_HOME": f"{folder}/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torchinductor",
    }


def temporary_mounts() -> list[Manifest]:
    """Return the mounts of ``temporary_volumes``."""
    return [
        {"name": "tmp", "mountPath": TMP_FOLDER},
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 (where processes of one pod meet)
    ]


def temporary_volumes(*, shared_memory: str) -> list[Manifest]:
    """Return the volumes that every pod writes to, deleted with it.

    Args:
        shared_memory: size of /dev/shm, part of the pod's memory.
    """
    return [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}},
    ]


def claim_mounts(volumes: Mapping[str, str], *, is_read_only: bool) -> list[Manifest]:
    """Return the mounts of ``claim_volumes``.

    Args:
        volumes: folder in the pod by claim.
        is_read_only: whether pods may only read them.
    """
    flag = {"readOnly": True} if is_read_only else {}
    return [{"name": f"data-{n}", "mountPath": path, **flag} for n, path in enumerate(volumes.values())]


def claim_volumes(volumes: Mapping[str, str], *, is_read_only: bool) -> list[Manifest]:
    """Return a volume for each claim that the user names."""
    flag = {"readOnly": True} if is_read_only else {}
    return [
        {"name": f"data-{n}", "persistentVolumeClaim": {"claimName": claim, **flag}} for n, claim in enumerate(volumes)
    ]


def manifest_text(manifest: Manifest) -> str:
    """Return a tree as YAML that every parser reads alike.

    Texts of several lines are blocks. A text that any parser could read as something else is quoted: kubectl, helm,
    Compose, Prometheus and Grafana take more texts for numbers than PyYAML does.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        """YAML without anchors, with multi-line texts as blocks."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else "'" if _is_ambiguous(value) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    dumped: str = yaml.dump(manifest, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return dumped


def _is_ambiguous(text: str) -> bool:
    """Return whether a parser could take an unquoted text for something else."""
    return text.lower() in _WORDS | _NO_NUMBERS or _NUMBER.fullmatch(text) is not None
