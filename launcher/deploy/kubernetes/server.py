"""Names, labels and numbers that all manifests of one server share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from launcher.backends.kubernetes.manifest_parts import Manifest
from launcher.config.deploy.kubernetes import KubernetesDeploy
from launcher.config.job.serve import Serve
from launcher.config.run import Run
from launcher.deploy.container_run import container_run, snapshot_with_hash
from launcher.deploy.kubernetes.group import INDEX_LABEL, run_of_group
from launcher.protocol.plan import Plan

PORT_NAME = "http"
VERSION_LABEL = "app.kubernetes.io/version"
_GIB = 1 << 30


@dataclass(frozen=True)
class Server:
    """A server in Kubernetes: input of every manifest."""

    run: Run
    plan: Plan

    @property
    def deploy(self) -> KubernetesDeploy:
        """The options."""
        assert isinstance(self.run.deploy, KubernetesDeploy)
        return self.run.deploy

    @property
    def job(self) -> Serve:
        """What is served, and how."""
        assert isinstance(self.run.job, Serve)
        return self.run.job

    @property
    def name(self) -> str:
        """Name of what all versions share."""
        return self.deploy.object_name(self.run)

    @property
    def versioned(self) -> str:
        """Name of what this version has for itself."""
        return self.name_of(self.deploy.version)

    def name_of(self, version: str) -> str:
        """Return the name of what a version has for itself."""
        return f"{self.name}-{version}"

    @property
    def shared_labels(self) -> dict[str, str]:
        """Labels of what all versions share; the first one selects the pods of all."""
        return {"app.kubernetes.io/name": self.name, "app.kubernetes.io/managed-by": "launcher"}

    @property
    def selector(self) -> dict[str, str]:
        """Labels that select the pods of this version."""
        return {"app.kubernetes.io/name": self.name, VERSION_LABEL: self.deploy.version}

    @property
    def labels(self) -> dict[str, str]:
        """Labels of what this version has for itself."""
        return {**self.selector, "app.kubernetes.io/managed-by": "launcher"}

    def metadata(self, name: str | None = None) -> Manifest:
        """Return the metadata of an object of this version."""
        return {"name": name or self.versioned, "namespace": self.deploy.namespace, "labels": self.labels}

    def shared_metadata(self) -> Manifest:
        """Return the metadata of an object of all versions."""
        return {"name": self.name, "namespace": self.deploy.namespace, "labels": self.shared_labels}

    @property
    def is_group(self) -> bool:
        """Whether an engine has several pods."""
        return self.deploy.pods_per_engine > 1

    @property
    def num_pods(self) -> int:
        """Pods of the workload."""
        return self.deploy.replicas * self.deploy.pods_per_engine

    @property
    def client_selector(self) -> dict[str, str]:
        """Labels that select the pods of all versions to which clients connect."""
        first = {INDEX_LABEL: "0"} if self.is_group else {}
        return {"app.kubernetes.io/name": self.name, **first}

    @property
    def is_stateful(self) -> bool:
        """Whether the workload is a StatefulSet."""
        return self.deploy.is_stateful(self.plan)

    @property
    def workload(self) -> Mapping[str, str]:
        """Return what an autoscaler refers to."""
        kind = "StatefulSet" if self.is_stateful else "Deployment"
        return {"apiVersion": "apps/v1", "kind": kind, "name": self.versioned}

    @property
    def host_names(self) -> list[str]:
        """Names by which clients inside and outside of the cluster reach the server."""
        domain = f"{self.deploy.namespace}.svc"
        forms = ("{}", f"{{}}.{self.deploy.namespace}", f"{{}}.{domain}", f"{{}}.{domain}.cluster.local")
        return [*(form.format(name) for name in (self.name, self.versioned) for form in forms), *self.deploy.hostnames]

    @cached_property
    def run_in_pod(self) -> Run:
        """The run that a pod starts."""
        deploy = self.deploy
        path = None if deploy.model_from == "hub" else deploy.model_path
        has_keys = deploy.keys_from is not None
        run = container_run(self.run, names=self.host_names, has_keys=has_keys, model_path=path)
        return run_of_group(run, deploy, memory=self.memory) if self.is_group else run

    @cached_property
    def snapshot(self) -> tuple[str, str]:
        """Its text, and its SHA-256."""
        return snapshot_with_hash(self.run_in_pod)

    @property
    def config_name(self) -> str:
        """Name of the ConfigMap: another run is another object, which starts new pods."""
        return f"{self.versioned}-{self.snapshot[1][:10]}"

    @property
    def startup_s(self) -> int:
        """Seconds that a start may take."""
        return self.deploy.startup_s(self.run)

    @property
    def memory(self) -> str:
        """RAM of the server's container."""
        if self.deploy.memory != "auto":
            return self.deploy.memory
        return f"{self.deploy.memory_bytes(self.run, self.plan) // _GIB}Gi"
