"""Options of ``deploy=helm``: the manifests of ``deploy=kubernetes`` as a chart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.deploy.kubernetes import KubernetesDeploy
from launcher.errors import ConfigError

VALUES = (
    *("image", "replicas", "memory", "service_port", "max_unavailable", "min_replicas", "max_replicas"),
    *("node_selector", "tolerations", "image_pull_secrets"),
)
"""Options that are values of the chart: they differ by cluster and follow from no plan."""


@dataclass(frozen=True, kw_only=True)
class HelmDeploy(KubernetesDeploy):
    """A chart of the manifests; its values are those options that change between clusters."""

    kind: ClassVar[str] = "helm"

    def validate(self) -> Iterator[ConfigError]:
        """Reject a second version beside the first: a release has one."""
        yield from super().validate()
        if self.pods_per_engine > 1:
            why = "the values of a chart would change the number of its pods alone"
            yield self.error("pods_per_engine", why, "set deploy=kubernetes")
        if self.baseline is not None:
            why = "a release has one version, and an upgrade replaces it"
            yield self.error("baseline", why, "set deploy=kubernetes, which runs two versions side by side")
