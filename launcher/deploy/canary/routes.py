"""Weights of two versions in a cluster: a VirtualService, or an HTTPRoute.

The route itself holds all state: the weights, and the progress in an annotation, which one request writes together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import yaml

from launcher.backends.kubernetes.manifest_parts import manifest_text
from launcher.deploy.canary.progress import Progress, load_progress
from launcher.deploy.canary.split import Live, update_folder, with_share
from launcher.deploy.cluster import AS_LAUNCHER, Deployment, versions
from launcher.deploy.kubernetes.render import FOLDER
from launcher.deploy.kubernetes.traffic import ROUTES, route_shares, route_targets
from launcher.errors import EnvironmentProblem

ANNOTATION = "launcher/canary"


@dataclass(kw_only=True)
class RouteSplit:
    """The route of a deployment with a baseline."""

    deployment: Deployment
    _percent_in_folder: int = field(init=False)
    _revision: str | None = field(default=None, init=False)
    """Of the route as it was seen last: a write fails if another client wrote meanwhile."""

    def __post_init__(self) -> None:
        self._percent_in_folder = self.deployment.deploy.canary_share

    @property
    def where(self) -> str:
        """Return kubectl's name of the route."""
        return f"{self._route[0]}/{self.deployment.name}"

    @property
    def version(self) -> str:
        """Return the version of the folder."""
        return self.deployment.deploy.version

    @property
    def canary_matchers(self) -> tuple[str, ...]:
        """Return matchers of this version's pods."""
        return self._matchers(self.version)

    @property
    def baseline_matchers(self) -> tuple[str, ...]:
        """Return matchers of the baseline's pods."""
        return self._matchers(self._baseline)

    def check_files(self) -> None:
        """Do nothing: only the weights in the manifest are changed."""

    def read(self) -> Live:
        """Return the weights in the cluster."""
        return self._live(self.deployment.kubectl.run("get", self.where, "--ignore-not-found", "--output=json"))

    def write(self, progress: Progress) -> None:
        """Apply the route of the folder with other weights."""
        folder = self.deployment.folder
        path = f"{FOLDER}/{self._route[1]}"
        manifest = yaml.safe_load((folder / path).read_text(encoding="utf-8"))
        shares = {self._baseline: 100 - progress.percent, self.version: progress.percent}
        for version, target in route_targets(manifest, self.deployment.name):
            if version in shares:
                target["weight"] = shares[version]
        text = manifest_text(manifest)
        applied = json.loads(json.dumps(manifest))
        applied["metadata"] |= {
            "annotations": {**applied["metadata"].get("annotations", {}), ANNOTATION: progress.dump()},
            **({"resourceVersion": self._revision} if self._revision else {}),
        }
        done = self.deployment.kubectl.run(
            "apply", *AS_LAUNCHER, "--filename=-", "--output=json", document=json.dumps(applied)
        )
        live = self._live(done)
        if live.percent != progress.percent:
            why = f"{self.where}: {self.version} gets {live.percent} % instead of {progress.percent} % after the write"
            raise EnvironmentProblem(f"{why}; see who changes it, and what admits it")
        if self._percent_in_folder != progress.percent:
            update_folder(folder, with_share(self.deployment.run, progress.percent), {path: text})
            self._percent_in_folder = progress.percent

    def problem(self) -> str | None:
        """Return why no pod of this version serves."""
        if self.deployment.deploy.autoscaling != "none" and self.deployment.deploy.min_replicas == 0:
            return None
        ready = versions(self.deployment).get(self.version)
        if ready is None:
            return f"{self.deployment.versioned} is not in {self.deployment.deploy.namespace}"
        return None if ready else f"no pod of {self.deployment.versioned} is ready"

    @property
    def _baseline(self) -> str:
        assert self.deployment.deploy.baseline is not None, "open_canary refuses others"
        return self.deployment.deploy.baseline

    @property
    def _route(self) -> tuple[str, str]:
        return ROUTES[self.deployment.deploy.traffic]

    def _matchers(self, version: str) -> tuple[str, ...]:
        deployment = self.deployment
        return (
            f'namespace="{deployment.deploy.namespace}"',
            f'job="{deployment.name}"',
            f'app_kubernetes_io_version="{version}"',
        )

    def _live(self, text: str) -> Live:
        try:
            route = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError) as error:
            raise EnvironmentProblem(f"kubectl printed invalid JSON about {self.where}: {text[:200]!r}") from error
        shares = route_shares(route, self.deployment.name)
        missing = [name for name in (self._baseline, self.version) if name not in shares]
        if missing:
            why = f"{self.where} routes nothing to {' and '.join(missing)}"
            raise EnvironmentProblem(f"{why}: launch deploy apply {self.deployment.folder} comes first")
        self._revision = route["metadata"].get("resourceVersion")
        annotation = route["metadata"].get("annotations", {}).get(ANNOTATION)
        return Live(percent=shares[self.version], progress=load_progress(annotation, version=self.version))
