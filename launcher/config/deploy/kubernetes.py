"""Options of ``deploy=kubernetes``: a server as a workload behind a Service."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, Self

from launcher.config.deploy.base import ContainerDeploy, UnusedOptions
from launcher.config.deploy.canary import CanaryDeploy
from launcher.config.deploy.monitoring import SLO_OPTIONS, MonitoredDeploy
from launcher.config.job.serve import Serve
from launcher.config.kubernetes_objects import (
    NAME_RULE,
    is_label,
    is_subdomain,
    parse_quantity,
    validate_context,
    validate_image,
    validate_keys,
    validate_labels,
    validate_mount,
    validate_names,
    validate_tolerations,
)
from launcher.config.run import Run
from launcher.config.urls import HTTP, validate_url
from launcher.errors import ConfigError, ConfigErrors
from launcher.protocol.plan import Host, Plan
from launcher.utils.text import bytes_text, counted

ModelSource = Literal["hub", "image", "claim", "image_volume", "object_store"]
_MOUNTED = ("claim", "image_volume", "object_store")
_OWN_MOUNTS = ("/run/launcher", "/runs", "/cache", "/tmp", "/dev/shm")  # noqa: S108 (paths in pods)
_MAX_VERSION = 12
_GIB = 1 << 30
_STARTS = 3
"""How many times the measured load time a start may take: a busy node, a cold disk."""
_LEAST_START_S = 300
_PARAM_BYTES = 4
_DOWNLOAD_BYTES_PER_S = 25e6
_LOCAL_PATHS = (
    "run.root",
    "run.dir",
    "deploy.out",
    "job.vllm_python",
    "job.api_keys_file",
    "model.name",
    "model.weights",
)
"""Paths that no container reads as they are.

They are written here, are in the image, or are replaced by ``deploy.model_path``.
"""


@dataclass(frozen=True, kw_only=True)
class KubernetesDeploy(CanaryDeploy, MonitoredDeploy, ContainerDeploy):
    """Manifests that kubectl applies: workload, Service, ConfigMap and what belongs to them."""

    kind: ClassVar[str] = "kubernetes"
    summary_fields: ClassVar[tuple[str, ...]] = ("out", "replicas")
    canary_option: ClassVar[str] = "deploy.baseline=VERSION, the version that serves already"
    share_option: ClassVar[str] = "deploy.weights"

    own_ranks: ClassVar[str] = (
        "leave backend out; deploy.pods_per_engine divides the ranks of an engine over pods, and so over nodes"
    )

    minimums: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("replicas", "pods_per_engine", "max_replicas", "target_requests", "max_unavailable"), 1),
        **dict.fromkeys(("min_replicas", "pre_stop_s"), 0),
    }
    """Least values of numbers."""

    namespace: str = "default"
    """Namespace of everything."""

    context: str | None = None
    """Context of kubectl, and so the cluster; ``null`` is the current one."""

    workload: Literal["auto", "deployment", "stateful_set"] = "auto"
    """Kind of workload; ``auto`` is a StatefulSet if an engine has several ranks.
    Otherwise it is a Deployment. Each pod of a StatefulSet keeps a cache of model files of its own."""

    pods_per_engine: int = 1
    """Pods over which the ranks of one engine are divided.
    ``gpus``, ``cpus`` and ``memory`` are those of one.
    Clients reach the first one. Where one ends, all start again, and an update does that too."""

    pods_secret: str | None = None
    """An existing Secret for ``pods_per_engine``, with the entry ``key``.
    By it the pods of an engine know each other."""

    replicas: int = 1
    """Pods, each with ``job.replicas`` engines; an autoscaler sets their number itself."""

    service_port: int = 80
    """Port of the Service."""

    secret: str | None = None
    """An existing Secret; its entries become variables of the server.
    Such are ``HF_TOKEN`` and ``AWS_ACCESS_KEY_ID``."""

    keys_from: str | None = None
    """An existing Secret with the entry ``LAUNCHER_API_KEYS``: keys separated by commas.
    Clients must then send one of them."""

    image_pull_secrets: tuple[str, ...] = ()
    """Secrets with which images are pulled."""

    run_as_user: int = 1000
    """User id in the containers; never root."""

    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have."""

    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints that pods tolerate, as in a pod's specification."""

    spread: tuple[str, ...] = ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
    """Labels of nodes over which pods are spread, as far as possible."""

    max_unavailable: int = 1
    """Pods that may be drained from their nodes at the same time."""

    shared_memory: str = "1Gi"
    """Size of /dev/shm, through which the processes of one pod communicate."""

    load_s: float = 120.0
    """Measured seconds from the start of a server until it is ready.
    A start may take three times as long, but at least 300 s, because the first one compiles kernels. Files from the
    hub or an object store add the time of their download: 4 bytes a parameter at 25 MB/s; of a model whose size is
    unknown it is that of ``cache_size``. A server prints ``load_s`` (``serving … after 41.2 s``); of a saved run it is
    read from its log."""

    pre_stop_s: int = 5
    """Seconds between the removal of a pod from the Service and SIGTERM.
    Requests that are sent meanwhile still arrive."""

    model_from: ModelSource = "hub"
    """Where a pod gets the model: from the hub, its image, or a volume.
    ``hub``: what the run names, downloaded into a cache; ``image``: a folder in the image; the others are mounted."""

    model_source: str | None = None
    """The claim, the image with the files, or the URL of a folder (``s3://bucket/model``)."""

    model_path: str = "/models"
    """Folder of the model in the container.
    It replaces ``model.weights`` unless ``model_from=hub``."""

    model_subpath: str = ""
    """Folder of the model in the claim or the image; empty for its root."""

    cache_claim: str | None = None
    """PersistentVolumeClaim (ReadWriteMany) for files of the hub and compiled kernels.
    Without one each pod has a cache of its own."""

    cache_size: str = "20Gi"
    """Size of that cache of a pod, and of the model's files from an object store."""

    volumes: dict[str, str] = field(default_factory=dict)
    """More claims and where pods see them, read only: ``{adapters: /adapters}``."""

    vllm_image: str | None = None
    """Image for ``job.engine=vllm``: with this program, and with vLLM at ``job.vllm_python``."""

    autoscaling: Literal["none", "hpa", "keda"] = "none"
    """What sets the number of pods: nothing, a HorizontalPodAutoscaler, or KEDA."""

    min_replicas: int = 1
    """Least pods; 0 needs ``autoscaling=keda`` and ``queue_query``."""

    max_replicas: int = 4
    """Most pods."""

    monitoring: bool = False
    """Whether the Prometheus operator of the cluster scrapes the pods and gets alerts.
    Adds a ServiceMonitor, a PrometheusRule and a ConfigMap with Grafana's dashboard."""

    target_requests: int = 16
    """Requests, running and waiting, for which one pod is provided."""

    prometheus: str | None = None
    """Address of Prometheus for KEDA: ``http://prometheus.monitoring:9090``."""

    queue_query: str | None = None
    """PromQL of the requests that wait in front of the pods, at the gateway.
    It starts the first pod: without pods nothing else counts requests."""

    traffic: Literal["none", "istio", "gateway"] = "none"
    """Routes from outside: those of Istio, or of the Gateway API.
    ``istio`` is a VirtualService and a DestinationRule, ``gateway`` an HTTPRoute."""

    gateway: str | None = None
    """Existing gateway of the routes: NAME or NAMESPACE/NAME."""

    hostnames: tuple[str, ...] = ()
    """Host names that clients use."""

    version: str = "v1"
    """Version of this deployment: part of the names of its pods, so that two run side by side."""

    baseline: str | None = None
    """Version that serves already, while this one is a canary.
    ``launch deploy promote`` gives the canary more requests, step by step."""

    weights: dict[str, int] = field(default_factory=dict)
    """Percent of the requests by version: ``{v1: 90, v2: 10}``.
    Empty sends all to the baseline, or without one to this version."""

    @property
    def is_mounted(self) -> bool:
        """Whether the model is a volume of the pod."""
        return self.model_from in _MOUNTED

    @property
    def shares(self) -> Mapping[str, int]:
        """Return the percent of the requests of each version."""
        if self.weights or self.baseline is None:
            return self.weights or {self.version: 100}
        return {self.baseline: 100, self.version: 0}

    @property
    def has_canary(self) -> bool:
        """Whether this version runs beside the one that serves."""
        return self.baseline is not None

    @property
    def canary_share(self) -> int:
        """Percent of the requests that this version gets."""
        return self.shares.get(self.version, 0)

    @property
    def version_names(self) -> tuple[str, str]:
        """Names of the baseline and of this version."""
        return self.baseline or "", self.version

    def with_canary_share(self, percent: int) -> Self:
        """Return the same options with another share of this version."""
        assert self.baseline is not None, "without a baseline there is nothing to share"
        return replace(self, weights={self.baseline: 100 - percent, self.version: percent})

    @property
    def gate_prometheus(self) -> str | None:
        """Address of the Prometheus that gates are read from; that of KEDA too."""
        return self.canary_prometheus or self.prometheus

    def hosts(self, run: Run) -> tuple[Host, ...]:
        """Return each pod of one engine as a host with its share of the ranks.

        Raises:
            ConfigErrors: the ranks cannot be divided.
        """
        (host,) = super().hosts(run)
        if self.pods_per_engine < 2:
            return (host,)
        if host.slots % self.pods_per_engine:
            why = f"an engine has {counted(host.slots, 'rank')}, which cannot be divided over so many pods"
            fix = f"set parallel=tensor parallel.tensor={self.pods_per_engine}, or parallel=pipeline; or leave it out"
            raise ConfigErrors([self.error("pods_per_engine", why, fix)])
        slots = host.slots // self.pods_per_engine
        return tuple(replace(host, name=f"{host.name}-{number}", slots=slots) for number in range(self.pods_per_engine))

    def is_stateful(self, plan: Plan) -> bool:
        """Return whether the workload is a StatefulSet."""
        return plan.world_size > 1 if self.workload == "auto" else self.workload == "stateful_set"

    def startup_s(self, run: Run) -> int:
        """Return the seconds that a start may take before it counts as failed."""
        loading_s = max(_LEAST_START_S, _STARTS * self.load_s)
        return math.ceil(loading_s + self._downloaded_bytes(run) / _DOWNLOAD_BYTES_PER_S)

    def _downloads(self, run: Run) -> bool:
        """Return whether pods download the model."""
        if self.model_from != "hub":
            return self.model_from == "object_store"
        is_echo = isinstance(run.job, Serve) and run.job.engine == "echo"
        return not is_echo and run.model.weights == "pretrained" and isinstance(run.model.pretrained_source(), str)

    def _downloaded_bytes(self, run: Run) -> int:
        """Return the bytes of the model that a pod downloads at most."""
        shape = run.model.shape()
        if not self._downloads(run):
            return 0
        return _PARAM_BYTES * shape.num_params if shape is not None else parse_quantity(self.cache_size) or 0

    def server_image(self, run: Run) -> str:
        """Return the image of the server's container."""
        is_vllm = isinstance(run.job, Serve) and run.job.engine == "vllm"
        return self.vllm_image if is_vllm and self.vllm_image else self.image

    def validate(self) -> Iterator[ConfigError]:
        """Reject what the cluster would refuse later, and less clearly."""
        yield from super().validate()
        for name, least in self.minimums.items():
            yield from self.validate_minimum(least, name)
        yield from self._validate_names()
        yield from validate_tolerations("deploy.tolerations", self.tolerations)
        if self.load_s <= 0:
            yield self.error("load_s", "must be above 0", "set deploy.load_s=120")
        yield from validate_keys("deploy.spread", self.spread)
        yield from validate_labels("deploy.node_selector", self.node_selector, owned={})
        if self.run_as_user < 1:
            why = "must be above 0: restricted namespaces refuse root"
            yield self.error("run_as_user", why, "set deploy.run_as_user=1000")
        if not 0 < self.service_port < 65536:
            yield self.error("service_port", "must lie between 1 and 65535", "set deploy.service_port=80")
        for name in ("shared_memory", "cache_size"):
            if parse_quantity(getattr(self, name)) is None:
                yield self.error(name, "is not an amount of memory", f"write it like deploy.{name}=2Gi")
        yield from self._validate_model()
        yield from self._validate_mounts()
        yield from self._validate_group()
        yield from self._validate_autoscaling()
        yield from self._validate_traffic()

    def _validate_names(self) -> Iterator[ConfigError]:
        if not is_label(self.namespace):
            yield self.error("namespace", "is not a valid name of a namespace", f"use at most 63 {NAME_RULE}")
        yield from validate_context("deploy.context", self.context)
        one = {name: getattr(self, name) for name in ("secret", "keys_from", "pods_secret", "cache_claim")}
        many = {"image_pull_secrets": self.image_pull_secrets, "volumes": tuple(self.volumes)}
        yield from validate_names("deploy", {**{k: (v,) for k, v in one.items() if v is not None}, **many})
        versions = {"version": (self.version,), "weights": tuple(self.weights)}
        if self.baseline is not None:
            versions["baseline"] = (self.baseline,)
        for name, values in versions.items():
            for value in values:
                if not is_label(value) or len(value) > _MAX_VERSION:
                    why = "is not a valid version: it is part of names in the cluster"
                    fix = f"use at most {_MAX_VERSION} {NAME_RULE}"
                    yield ConfigError(f"deploy.{name}", value, why=why, fix=fix)

    def _validate_model(self) -> Iterator[ConfigError]:
        source = self.model_source
        if self.is_mounted and source is None:
            example = {"claim": "CLAIM", "image_volume": "registry/team/model:tag", "object_store": "s3://bucket/model"}
            why = f"deploy.model_from={self.model_from} needs a source"
            yield ConfigError("deploy.model_source", why=why, fix=f"set deploy.model_source={example[self.model_from]}")
        elif self.model_from == "claim" and source is not None and not is_subdomain(source):
            yield self.error("model_source", "is not a valid name of a claim", f"use {NAME_RULE}, and dots")
        elif self.model_from == "image_volume" and source is not None:
            yield from validate_image("deploy.model_source", source, logins="deploy.image_pull_secrets")
        elif self.model_from == "object_store" and source is not None:
            what, url = "the URL of a folder", "s3://bucket/model"
            yield from validate_url("deploy.model_source", source, what=what, example=url)
        if self.model_subpath.startswith("/") or ".." in self.model_subpath.split("/"):
            yield self.error("model_subpath", "is not a folder below the volume", "write it like team/model")
        if self.vllm_image is not None:
            yield from validate_image("deploy.vllm_image", self.vllm_image, logins="deploy.image_pull_secrets")

    def _validate_mounts(self) -> Iterator[ConfigError]:
        taken = dict.fromkeys(_OWN_MOUNTS, "the launcher itself")
        named = {"model_path": self.model_path} if self.model_from != "hub" else {}
        for name, path in {**named, **{f"volumes.{claim}": path for claim, path in self.volumes.items()}}.items():
            yield from validate_mount(f"deploy.{name}", path, taken=taken)

    def _validate_group(self) -> Iterator[ConfigError]:
        """Reject what an engine over several pods does not have."""
        if self.pods_per_engine < 2:
            return
        many = f"an engine has {self.pods_per_engine} pods (deploy.pods_per_engine)"
        if self.pods_secret is None:
            why = f"{many}, which know each other by a key"
            fix = (
                "kubectl create secret generic NAME --from-literal=key=$(openssl rand -hex 32), deploy.pods_secret=NAME"
            )
            yield ConfigError("deploy.pods_secret", why=why, fix=fix)
        if self.replicas != 1:
            why = f"{many}, and this is one engine"
            fix = "leave it out; render further engines under another deploy.name or deploy.version"
            yield self.error("replicas", why, fix)
        if self.autoscaling != "none":
            yield self.error("autoscaling", f"{many}, and their number is fixed", "leave it out")
        if self.workload == "deployment":
            yield self.error("workload", f"{many}, which need names of their own", "leave it out")
        if self.traffic == "gateway":
            why = f"{many}, and a route to one version would lead to all of them"
            yield self.error("traffic", why, "set deploy.traffic=istio, whose routes lead to the first one")

    def _validate_autoscaling(self) -> Iterator[ConfigError]:
        if self.prometheus is not None:
            what, example = "the address of Prometheus", "http://prometheus.monitoring:9090"
            yield from validate_url("deploy.prometheus", self.prometheus, what=what, example=example, schemes=HTTP)
        if self.autoscaling == "none":
            return
        if self.min_replicas > self.max_replicas:
            why = f"is more than deploy.max_replicas={self.max_replicas}"
            yield self.error("min_replicas", why, f"set deploy.max_replicas={self.min_replicas} or more")
        if self.autoscaling == "hpa" and self.min_replicas == 0:
            why = "a HorizontalPodAutoscaler keeps one pod, whose metric it reads"
            yield self.error("min_replicas", why, "set deploy.autoscaling=keda and deploy.queue_query, or 1")
        if self.autoscaling == "keda":
            if self.prometheus is None:
                fix = "set deploy.prometheus=http://prometheus.monitoring:9090"
                yield ConfigError("deploy.prometheus", why="KEDA reads the metric from Prometheus", fix=fix)
            if self.queue_query is not None and not self.queue_query.strip():
                yield self.error("queue_query", "is empty", "give the PromQL of the gateway's queue, or leave it out")
            elif self.min_replicas == 0 and self.queue_query is None:
                why = "without pods none of their metrics counts requests, so no pod would ever start"
                yield self.error("min_replicas", why, "set deploy.queue_query=<PromQL of the gateway's queue>, or 1")

    def _validate_traffic(self) -> Iterator[ConfigError]:
        if self.traffic == "none":
            return
        if self.gateway is None:
            why = f"deploy.traffic={self.traffic} attaches its routes to a gateway"
            yield ConfigError("deploy.gateway", why=why, fix="set deploy.gateway=NAMESPACE/NAME")
        elif self.gateway.count("/") > 1 or not all(map(is_subdomain, self.gateway.split("/"))):
            yield self.error("gateway", "is not the name of a gateway", "write it like istio-system/gateway")
        for name in self.hostnames:
            if not is_subdomain(name.removeprefix("*.")):
                fix = "write it like models.example.org"
                yield ConfigError("deploy.hostnames", name, why="is not a host name", fix=fix)
        if not self.hostnames and self.traffic == "istio":
            why = "a VirtualService is for host names"
            yield ConfigError("deploy.hostnames", why=why, fix="set deploy.hostnames=[models.example.org]")
        if self.baseline == self.version:
            why = "is this version itself: a canary is compared with another one"
            yield self.error("baseline", why, f"set deploy.version={_next_version(self.version)}, or another baseline")
        if self.has_canary and self.monitoring and self.canary_interval_s < 2 * self.scrape_every_s:
            why = f"is less than two scrapes, 2 × deploy.scrape_every_s={self.scrape_every_s}, so no rate is known"
            yield self.error("canary_interval_s", why, f"set deploy.canary_interval_s={4 * self.scrape_every_s}")
        if self.weights:
            yield from self._validate_weights()

    def _validate_weights(self) -> Iterator[ConfigError]:
        shown, total = ", ".join(f"{name}: {share}" for name, share in self.weights.items()), sum(self.weights.values())
        if min(self.weights.values()) < 0:
            why = "has a share below 0"
            yield ConfigError("deploy.weights", f"{{{shown}}}", why=why, fix="let each be 0 to 100, and all sum to 100")
        elif total != 100:
            why = f"{' + '.join(map(str, self.weights.values()))} = {total} percent, not 100"
            yield ConfigError("deploy.weights", f"{{{shown}}}", why=why, fix="let the weights sum to 100")
        known = {self.version, *([self.baseline] if self.baseline else [])}
        for name in self.weights:
            if name not in known:
                why = "is neither deploy.version nor deploy.baseline" if self.baseline else "a canary needs a baseline"
                fix = f"set deploy.baseline={name}, the version that serves already, or leave it out"
                yield ConfigError("deploy.weights", name, why=why, fix=fix)

    def canary_warnings(self) -> Iterator[str]:
        """Add that nothing scrapes the series of the gates."""
        yield from super().canary_warnings()
        if self.has_canary and not self.monitoring:
            yield (
                "deploy.monitoring=false renders no scrapes, and launch deploy promote reads series with the labels "
                "namespace, job and app_kubernetes_io_version: set deploy.monitoring=true, or label your own scrapes so"
            )

    def unused_options(self, run: Run) -> Iterator[UnusedOptions]:
        """Add what belongs to an autoscaler, a route, a source or an engine that is not there."""
        yield from super().unused_options(run)
        yield from self._unused_with_autoscaling()
        if self.traffic == "none":
            names = ("gateway", "hostnames", "weights", "baseline")
            why = "nothing routes requests (deploy.traffic=none)"
            yield UnusedOptions(names, why, "set deploy.traffic=istio or gateway")
        if self.pods_per_engine < 2:
            why = "an engine is one pod (deploy.pods_per_engine=1)"
            yield UnusedOptions(("pods_secret",), why, "set deploy.pods_per_engine")
        if not self.monitoring:
            why = "nothing is scraped and there are no alerts (deploy.monitoring=false)"
            yield UnusedOptions(("scrape_every_s", *SLO_OPTIONS), why, "set deploy.monitoring=true")
        if not isinstance(run.job, Serve) or run.job.engine != "vllm":
            why = f"job.engine={getattr(run.job, 'engine', 'none')} runs in deploy.image"
            yield UnusedOptions(("vllm_image",), why, "set job.engine=vllm")
        yield from self._unused_with_source(run)

    def _unused_with_autoscaling(self) -> Iterator[UnusedOptions]:
        of_keda = ("queue_query", *(() if self.has_canary else ("prometheus",)))
        if self.autoscaling == "none":
            why = "nothing scales the pods (deploy.autoscaling=none)"
            names = ("min_replicas", "max_replicas", "target_requests", *of_keda)
            yield UnusedOptions(names, why, "set deploy.autoscaling=keda")
            return
        why = f"deploy.autoscaling={self.autoscaling} sets the number of pods"
        yield UnusedOptions(("replicas",), why, "set deploy.min_replicas instead")
        if self.autoscaling == "hpa":
            why = "deploy.autoscaling=hpa reads the metrics of pods from the cluster"
            yield UnusedOptions(of_keda, why, "set deploy.autoscaling=keda")

    def _unused_with_source(self, run: Run) -> Iterator[UnusedOptions]:
        named = f"deploy.model_from={self.model_from}"
        if not self.is_mounted:
            instead = "set deploy.model_from=claim, image_volume or object_store"
            yield UnusedOptions(("model_source",), f"{named} has no such source", instead)
        if self.model_from not in ("claim", "image_volume"):
            yield UnusedOptions(("model_subpath",), f"{named} has no folders below its source")
        if self.model_from == "hub":
            why = f"{named} keeps the model in the cache"
            yield UnusedOptions(("model_path",), why, "set deploy.model_from to where the model is")
        is_counted = self._downloads(run) and run.model.shape() is None  # by startup_s
        if self.cache_claim is not None and self.model_from != "object_store" and not is_counted:
            why = f"the claim has a size of its own (deploy.cache_claim={self.cache_claim})"
            yield UnusedOptions(("cache_size",), why, "leave deploy.cache_claim out")

    def validate_run(self, run: Run, plan: Plan) -> Iterator[ConfigError]:
        """Reject files that no pod sees, keys in files, and engines without their image."""
        yield from super().validate_run(run, plan)
        job = run.job
        if not isinstance(job, Serve):
            return
        if job.api_keys_file is not None:
            why = "is a file of this machine, and secrets are in no manifest"
            fix = "leave it out, and name in deploy.keys_from a Secret whose entry LAUNCHER_API_KEYS holds the keys"
            yield ConfigError("job.api_keys_file", job.api_keys_file, why=why, fix=fix)
        if self.keys_from is not None and job.allowed_hosts:
            why = "clients send keys (deploy.keys_from), so Host headers are not checked"
            yield job.error("allowed_hosts", why, "leave job.allowed_hosts out")
        wild = [name for name in self.hostnames if "*" in name]
        if wild and self.keys_from is None:
            why = "a server without API keys accepts only whole names"
            fix = "name a Secret in deploy.keys_from, or name each host"
            yield ConfigError("deploy.hostnames", wild[0], why=why, fix=fix)
        if job.engine == "vllm" and self.vllm_image is None:
            why = "deploy.image has this program and no vLLM"
            fix = "set deploy.vllm_image=registry/team/launcher-vllm:tag job.vllm_python=<path in it>"
            yield ConfigError("job.engine", "vllm", why=why, fix=fix)
        if job.engine == "vllm" and self.pods_per_engine > 1:
            why = "vLLM is started in one pod"
            yield self.error("pods_per_engine", why, "leave it out, or set job.engine=paged")
        memory, shared = self.memory_bytes(run, plan), parse_quantity(self.shared_memory)
        if shared is not None and 0 < memory <= shared:
            why = f"is part of the container's memory, which is {bytes_text(memory)}"
            fix = f"set deploy.memory={-(-(memory + shared) // _GIB)}Gi, or less here"
            yield self.error("shared_memory", why, fix)
        yield from self._validate_paths(run, job)

    def _validate_paths(self, run: Run, job: Serve) -> Iterator[ConfigError]:
        folder = run.model.local_weights
        if folder is not None and self.model_from == "hub":
            why = "is a folder of this machine, which no pod sees"
            fix = f"set deploy.model_from=claim deploy.model_source=CLAIM, with the files of {folder} in the claim"
            yield ConfigError("model.weights", folder, why=why, fix=fix)
        unused = run.job.unused_groups(run)
        seen = (*self.volumes.values(), *([] if self.model_from == "hub" else [self.model_path]))
        for option, value in run.paths():
            group = option.partition(".")[0]
            if (
                option == "model.weights"
                or group in unused
                or group in ("tracker", "checkpoint", "deploy", "run")
                or option in _LOCAL_PATHS
            ):
                continue
            if not any(PurePosixPath(posixpath.normpath(value)).is_relative_to(path) for path in seen):
                why = "is a path of this machine, which no pod sees"
                fix = "give the path in the pods, below deploy.volumes={CLAIM: FOLDER}"
                yield ConfigError(option, value, why=why, fix=fix)


def _next_version(version: str) -> str:
    """Return a name for the version after this one: ``v3`` after ``v2``."""
    found = re.fullmatch(r"(.*?)(\d+)", version)
    following = f"{found[1]}{int(found[2]) + 1}" if found else f"{version}2"
    return following if len(following) <= _MAX_VERSION else "v2"
