"""Options of ``backend=kubernetes``: a pod for each host; the first pod runs the session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from launcher.config.backend.base import (
    DEFAULT_GLOBS,
    LEAST_MEMORY_BYTES,
    Backend,
    forwarded_names,
    needed_ram,
    needed_ram_text,
    plausible_memory,
    requested_ram,
)
from launcher.config.kubernetes_objects import (
    GPU,
    NAME_RULE,
    is_label,
    parse_quantity,
    validate_annotations,
    validate_context,
    validate_image,
    validate_interpreter,
    validate_labels,
    validate_mount,
    validate_names,
    validate_resources,
    validate_tolerations,
)
from launcher.config.urls import validate_url
from launcher.errors import ConfigError
from launcher.protocol.plan import Host, MemoryEstimate
from launcher.utils.text import bytes_text

Workload = Literal["indexed_job", "jobset", "pytorchjob", "trainjob"]


_LEAST_BYTES = {"memory": LEAST_MEMORY_BYTES, "shared_memory": 1 << 20}


_OWN_MOUNTS = ("/run/launcher", "/dev/shm", "/tmp")  # noqa: S108 (paths in pods)
_GIB = 1 << 30
_UNKNOWN_BYTES = 16 * _GIB
"""RAM of a pod for a run without an estimate."""

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_OWN_LABELS = {
    **dict.fromkeys(("app.kubernetes.io/name", "app.kubernetes.io/instance"), "the launcher finds the run by it"),
    QUEUE_LABEL: "backend.queue sets it",
}


@dataclass(frozen=True, kw_only=True)
class KubernetesBackend(Backend):
    """Ranks are processes of pods, one pod for each host; the first pod runs the session."""

    kind: ClassVar[str] = "kubernetes"
    summary_fields: ClassVar[tuple[str, ...]] = ("workload", "nodes", "gpus_per_node")

    restarts_itself: ClassVar[bool] = True
    shares_paths: ClassVar[bool] = False

    image: str
    """Container image with this program in it, and everything ranks need."""

    workload: Workload = "indexed_job"
    """Kind of workload: an Indexed Job, a JobSet, or Kubeflow's PyTorchJob or TrainJob."""

    nodes: int = 1
    """Pods, each of which is a host of the plan."""

    gpus_per_node: int = 0
    """GPUs of each pod; 0 computes on the CPU."""

    cpus: int = 4
    """Cores of each pod, reserved for it alone."""

    memory: str = "auto"
    """RAM of each pod, shared memory included; ``auto`` is what the plan's estimate needs.
    The estimate is model state in RAM, 2 GiB for each rank and 1 GiB for the launcher; ``auto`` adds shared memory,
    without GPUs a quarter for activations, and is 16Gi for a run without an estimate."""

    shared_memory: str = "2Gi"
    """Size of /dev/shm, through which the ranks of one pod communicate."""

    claim: str | None = None
    """PersistentVolumeClaim for run directories; several nodes need ReadWriteMany.
    Without one, each pod writes to storage of its own, which is deleted with it: only logs remain."""

    store: str | None = None
    """Folder of an object store that gets a copy of the run directory: ``s3://bucket/runs``.
    The first pod copies a checkpoint once it is complete, the rest at the end. Without ``claim`` a new pod continues
    from the copy."""

    store_grace_s: float = 300.0
    """Time for the last copy to ``store`` in a pod that is deleted."""

    mount: str = "/runs"
    """Where pods mount ``claim``.
    A run directory outside it is stored there, under its last two names."""

    volumes: dict[str, str] = field(default_factory=dict)
    """More claims and where pods see them: ``{datasets: /data}``."""

    resources: dict[str, int] = field(default_factory=dict)
    """Further resources of each pod by name, as of device plugins: ``{example.com/fpga: 1}``."""

    rdma: dict[str, int] = field(default_factory=dict)
    """RDMA devices of each pod: ``{rdma/hca_shared_devices_a: 1}``.
    Pods get the capability IPC_LOCK too, so the namespace must admit privileged pods."""

    host_network: bool = False
    """Whether pods use the network of their nodes, one pod of the run on each.
    The namespace must admit privileged pods."""

    namespace: str = "default"
    """Namespace of everything."""

    context: str | None = None
    """Context of kubectl, and so the cluster; ``null`` is the current one."""

    service_account: str | None = None
    """Service account of the pods, with which a cloud or a registry knows them.
    Its token is not mounted: no pod calls the cluster."""

    run_as_user: int = 1000
    """User id in the pods; 0, which is root, needs ``rdma``."""

    run_as_group: int | None = None
    """Group id in the pods, which also owns the files of claims.
    ``null`` is the same number as ``run_as_user``."""

    queue: str | None = None
    """Kueue's LocalQueue that admits the run; until then it is suspended."""

    priority_class: str | None = None
    """PriorityClass of the pods."""

    labels: dict[str, str] = field(default_factory=dict)
    """Further labels of all objects of the run, its pods among them."""

    annotations: dict[str, str] = field(default_factory=dict)
    """Annotations of the workload and its pods."""

    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have."""

    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints that pods tolerate, as in a pod's specification."""

    image_pull_secrets: tuple[str, ...] = ()
    """Secrets with which the image is pulled."""

    secret: str | None = None
    """An existing Secret; its entries become variables of the ranks."""

    forward: tuple[str, ...] = ()
    """Further environment variables that ranks get, as names or globs.
    NCCL_*, HF_*, WANDB_* and similar ones are always included."""

    python: str = "python"
    """The interpreter in the image."""

    ttl_s: int | None = None
    """Seconds until the cluster deletes an ended run; ``null`` keeps it until you delete it."""

    gather_timeout_s: float = 1800.0
    """Time that pods wait for each other while nodes are added and images pulled."""

    heartbeat_timeout_s: float = 4.0
    """Silence after which a pod counts as lost, and ends its own part of the run."""

    wait: bool = False
    """Stay, show the output and end with the run's exit code; Ctrl-C deletes the run."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject what the cluster would refuse later, and less clearly."""
        yield from super().validate()
        yield from self.validate_minimum(1, "nodes", "cpus", "heartbeat_timeout_s")
        yield from self.validate_minimum(0, "gpus_per_node", "ttl_s")
        if not self.gather_timeout_s > 0:
            yield self.error("gather_timeout_s", "must be above 0", "set backend.gather_timeout_s=1800")
        if not self.store_grace_s >= 0:
            yield self.error("store_grace_s", "must be at least 0", "set backend.store_grace_s=300")
        if self.store is not None:
            yield from validate_url("backend.store", self.store, what="the URL of a folder", example="s3://bucket/runs")
        yield from validate_interpreter("backend.python", self.python)
        yield from validate_context("backend.context", self.context)
        yield from self._bad_names()
        yield from self._validate_user()
        yield from self._validate_resources()
        is_sized = self.memory == "auto"
        sizes = {
            name: parse_quantity(getattr(self, name)) for name in _LEAST_BYTES if not (is_sized and name == "memory")
        }
        for name, size in sizes.items():
            if size is None:
                yield self.error(name, "is not an amount of memory", f"write it like backend.{name}=64Gi")
            elif size < _LEAST_BYTES[name]:
                unit = " (a number without a unit counts bytes)" if getattr(self, name).isdigit() else ""
                why = f"is {bytes_text(size)}{unit}, too little for any run"
                usual = plausible_memory(self.memory, "Gi") if name == "memory" else "64Mi"
                yield self.error(name, why, f"set backend.{name}={usual}")
        memory, shared = sizes.get("memory"), sizes["shared_memory"]
        if memory is not None and shared is not None and shared > memory >= _LEAST_BYTES["memory"]:
            why = f"is more than backend.memory={self.memory}, which includes it"
            yield self.error("shared_memory", why, f"set backend.memory={self.shared_memory} or more")
        taken = dict.fromkeys(_OWN_MOUNTS, "the launcher itself")
        for name, path in {"mount": self.mount, **{f"volumes.{c}": p for c, p in self.volumes.items()}}.items():
            yield from validate_mount(f"backend.{name}", path, taken=taken)
        yield from validate_tolerations("backend.tolerations", self.tolerations)

    def _bad_names(self) -> Iterator[ConfigError]:
        if not is_label(self.namespace):
            yield self.error("namespace", "is not a valid name of a namespace", f"use at most 63 {NAME_RULE}")
        if self.queue is not None and not is_label(self.queue):
            yield self.error("queue", "is not a valid name of a queue", f"use at most 63 {NAME_RULE}")
        named = {name: getattr(self, name) for name in ("claim", "service_account", "secret", "priority_class")}
        many = {"image_pull_secrets": self.image_pull_secrets, "volumes": tuple(self.volumes)}
        one = {key: (value,) for key, value in named.items() if value is not None}
        yield from validate_names("backend", {**one, **many})
        yield from validate_image("backend.image", self.image, logins="backend.image_pull_secrets")

    def _validate_user(self) -> Iterator[ConfigError]:
        if self.run_as_user < 0 or (self.run_as_user == 0 and not self.rdma):
            why = "is root, which most namespaces refuse" if self.run_as_user == 0 else "must be at least 0"
            yield self.error("run_as_user", why, "set backend.run_as_user=1000, or the user that owns backend.claim")
        yield from self.validate_minimum(0, "run_as_group")

    def _validate_resources(self) -> Iterator[ConfigError]:
        owned = {GPU: "backend.gpus_per_node", "cpu": "backend.cpus", "memory": "backend.memory"}
        yield from validate_resources("backend.resources", self.resources, owned=owned)
        yield from validate_resources("backend.rdma", self.rdma, owned=owned)
        for name in sorted(self.resources.keys() & self.rdma.keys()):
            yield ConfigError("backend.resources", name, why="is in backend.rdma too", fix="leave it out of one")
        yield from validate_labels("backend.labels", self.labels, owned=_OWN_LABELS)
        yield from validate_annotations("backend.annotations", self.annotations)
        yield from validate_labels("backend.node_selector", self.node_selector, owned={})

    def hosts(self, *, max_ranks: int | None) -> tuple[Host, ...]:
        """Return placeholders for the pods; their hosts are known once the run is submitted."""
        automatic = self.gpus_per_node or min(2, self.cpus)
        slots = min(automatic, max_ranks or automatic) if self.ranks == "auto" else self.ranks
        num_gpus = self.gpus_per_node
        return tuple(
            Host(
                name=f"node{number}",
                address=f"node{number}",
                ssh_destination=f"node{number}",
                slots=slots,
                devices=("GPU",) * num_gpus,
                device_ids=tuple(map(str, range(num_gpus))),
                cores=self.cpus,
                memory_bytes=parse_quantity(self.memory) or 0,
                python=self.python,
            )
            for number in range(self.nodes)
        )

    @property
    def writable_folders(self) -> tuple[str, ...]:
        """Volumes of the pods, whose image is read only."""
        return (self.mount, *self.volumes.values(), "/tmp", "/dev/shm")  # noqa: S108 (paths in pods)

    def run_dir_on_hosts(self, run_dir: str) -> str:
        """Return the run directory in pods: the same folder if on the mount, else one named alike."""
        folder = PurePosixPath(run_dir)
        if folder.is_relative_to(self.mount):
            return str(folder)
        return str(PurePosixPath(self.mount, folder.parent.name, folder.name))

    def forwards(self, environ: Mapping[str, str]) -> tuple[str, ...]:
        """Return the names of the variables that pods get from ``environ``.

        An image has a file system of its own: a path of this machine goes along only where ``forward`` names it.
        """
        usual = {name for name in forwarded_names(environ, DEFAULT_GLOBS) if not environ[name].startswith(("/", "~"))}
        return tuple(sorted(usual.union(forwarded_names(environ, self.forward))))

    def validate_hosts(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Yield an error for each option that the chosen workload does not support."""
        if self.workload == "pytorchjob" and self.restarts:
            why = "a PyTorchJob cannot distinguish failures from preemptions and user errors"
            yield self.error("restarts", why, "set backend.workload=indexed_job, or backend.restarts=0")
        if self.workload == "trainjob" and self.ttl_s is not None:
            yield self.error("ttl_s", "a TrainJob is never deleted automatically", "set backend.ttl_s=null")
        if self.store is not None and self.claim is None and self.nodes > 1:
            why = "without backend.claim each pod has files of its own, and the first one copies only its own"
            yield self.error("store", why, "set backend.claim=<PersistentVolumeClaim>, or backend.nodes=1")
        elif self.restarts and self.claim is None and self.store is None:
            why = "without backend.claim the checkpoints are deleted with the pods"
            fix = "set backend.claim=<PersistentVolumeClaim>, for one pod backend.store=s3://…, or backend.restarts=0"
            yield self.error("restarts", why, fix)

    def sized_hosts(self, hosts: Sequence[Host], memory: MemoryEstimate | None) -> Sequence[Host]:
        """Return ``hosts`` with the RAM that ``memory=auto`` asks for, in whole GiB."""
        if self.memory != "auto":
            return hosts
        return tuple(replace(host, memory_bytes=self._auto_bytes(host, memory)) for host in hosts)

    def memory_text(self, host: Host) -> str:
        """Return the RAM of a pod, which is ``host`` of the plan, as Kubernetes writes it."""
        return f"{host.memory_bytes // _GIB}Gi" if self.memory == "auto" else self.memory

    def _auto_bytes(self, host: Host, memory: MemoryEstimate | None) -> int:
        if memory is None:
            return _UNKNOWN_BYTES
        shared = parse_quantity(self.shared_memory) or 0
        return -(-(requested_ram(host, memory) + shared) // _GIB) * _GIB

    def validate_memory(self, hosts: Sequence[Host], memory: MemoryEstimate | None) -> Iterator[ConfigError]:
        """Yield an error if a pod has less RAM than the plan's estimate for its ranks."""
        given = parse_quantity(self.memory)
        if given is None or memory is None:
            return
        host = max(hosts, key=lambda host: needed_ram(host, memory))
        needed = needed_ram(host, memory)
        if given < needed:
            why = f"is {bytes_text(given)}, and a pod needs {bytes_text(needed)}: {needed_ram_text(host, memory)}"
            yield self.error("memory", why, f"set backend.memory={-(-needed // _GIB)}Gi or more, or auto")
