"""Options of ``deploy=kubernetes``: a server as a workload behind a Service."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.deploy.base import ContainerDeploy
from launcher.config.kubernetes_objects import NAME_RULE, is_label
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KubernetesDeploy(ContainerDeploy):
    """Manifests that kubectl applies: workload, Service, ConfigMap and what belongs to them."""

    kind: ClassVar[str] = "kubernetes"
    summary_fields: ClassVar[tuple[str, ...]] = ("out", "replicas")

    namespace: str = "default"
    """Namespace of everything."""

    context: str | None = None
    """Context of kubectl, and so the cluster; ``null`` is the current one."""

    replicas: int = 1
    """Pods, each with ``job.replicas`` engines."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject what the cluster would refuse later, and less clearly."""
        yield from super().validate()
        yield from self.validate_minimum(1, "replicas")
        if not is_label(self.namespace):
            yield self.error("namespace", "is not a valid name of a namespace", f"use at most 63 {NAME_RULE}")
