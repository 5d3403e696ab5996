"""Options of ``backend=kubernetes``: a pod for each host; the first pod runs the session."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from launcher.config.backend.base import (
    DEFAULT_GLOBS,
    LEAST_MEMORY_BYTES,
    Backend,
    forwarded_names,
    plausible_memory,
)
from launcher.config.kubernetes_objects import (
    NAME_RULE,
    is_label,
    parse_quantity,
    validate_image,
    validate_names,
    validate_tolerations,
)
from launcher.errors import ConfigError
from launcher.protocol.plan import Host
from launcher.utils.text import bytes_text

Workload = Literal["indexed_job", "jobset", "pytorchjob", "trainjob"]


_LEAST_BYTES = {"memory": LEAST_MEMORY_BYTES, "shared_memory": 1 << 20}


_OWN_MOUNTS = ("/run/launcher", "/dev/shm")  # noqa: S108 (paths in pods)


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

    memory: str = "16Gi"
    """RAM of each pod, shared memory included."""

    shared_memory: str = "2Gi"
    """Size of /dev/shm, through which the ranks of one pod communicate."""

    claim: str | None = None
    """PersistentVolumeClaim for run directories; several nodes need ReadWriteMany.
    Without one, each pod writes to storage of its own, which is deleted with it: only logs remain."""

    mount: str = "/runs"
    """Where pods mount ``claim``.
    A run directory outside it is stored there, under its last two names."""

    volumes: dict[str, str] = field(default_factory=dict)
    """More claims and where pods see them: ``{datasets: /data}``."""

    namespace: str = "default"
    """Namespace of everything."""

    context: str | None = None
    """Context of kubectl, and so the cluster; ``null`` is the current one."""

    service_account: str | None = None
    """Service account of the pods."""

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
        yield from self._bad_names()
        sizes = {name: parse_quantity(getattr(self, name)) for name in _LEAST_BYTES}
        for name, size in sizes.items():
            if size is None:
                yield self.error(name, "is not an amount of memory", f"write it like backend.{name}=64Gi")
            elif size < _LEAST_BYTES[name]:
                unit = " (a number without a unit counts bytes)" if getattr(self, name).isdigit() else ""
                why = f"is {bytes_text(size)}{unit}, too little for any run"
                usual = plausible_memory(self.memory, "Gi") if name == "memory" else "64Mi"
                yield self.error(name, why, f"set backend.{name}={usual}")
        memory, shared = sizes["memory"], sizes["shared_memory"]
        if memory is not None and shared is not None and shared > memory >= _LEAST_BYTES["memory"]:
            why = f"is more than backend.memory={self.memory}, which includes it"
            yield self.error("shared_memory", why, f"set backend.memory={self.shared_memory} or more")
        taken = dict.fromkeys(_OWN_MOUNTS, "the launcher itself")
        for name, path in {"mount": self.mount, **{f"volumes.{c}": p for c, p in self.volumes.items()}}.items():
            folder = posixpath.normpath(path)
            if not path.startswith("/") or ":" in path or folder in ("/", "//"):
                yield ConfigError(f"backend.{name}", path, why="pods mount at absolute paths", fix="begin it with /")
            elif folder in taken:
                why = f"is the folder of {taken[folder]} in every pod, and two volumes cannot share a folder"
                yield ConfigError(f"backend.{name}", path, why=why, fix="choose another folder")
            taken.setdefault(folder, f"backend.{name}")
        yield from validate_tolerations("backend.tolerations", self.tolerations)

    def _bad_names(self) -> Iterator[ConfigError]:
        if not is_label(self.namespace):
            yield self.error("namespace", "is not a valid name of a namespace", f"use at most 63 {NAME_RULE}")
        named = {name: getattr(self, name) for name in ("claim", "service_account", "secret")}
        many = {"image_pull_secrets": self.image_pull_secrets, "volumes": tuple(self.volumes)}
        one = {key: (value,) for key, value in named.items() if value is not None}
        yield from validate_names("backend", {**one, **many})
        yield from validate_image("backend.image", self.image, logins="backend.image_pull_secrets")

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
        if self.restarts and self.claim is None:
            why = "without backend.claim the checkpoints are deleted with the pods"
            yield self.error("restarts", why, "set backend.claim=<PersistentVolumeClaim>, or backend.restarts=0")
