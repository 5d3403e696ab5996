"""Manifests of a run: pod, workload (Job, JobSet, TrainJob, PyTorchJob) and ConfigMap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from launcher.backends.kubernetes.manifest_parts import (
    TMP_FOLDER,
    Manifest,
    claim_mounts,
    claim_volumes,
    container_security,
    escape_references,
    folder_variables,
    manifest_text,
    pod_security,
    resources,
    temporary_mounts,
    temporary_volumes,
)
from launcher.backends.kubernetes.pod_config import (
    CONFIG_FILE,
    KEY_FILE,
    MOUNT_PATH,
    REPLICATED_JOB,
    SNAPSHOT_FILE,
    PodConfig,
    job_name,
)
from launcher.backends.kubernetes.run_store import store_folder
from launcher.config.backend.kubernetes import QUEUE_LABEL, KubernetesBackend, Workload
from launcher.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_UNFIT, EXIT_USER_ERROR
from launcher.plugins.loading import plugins_of
from launcher.protocol.plan import Plan, RunIdentity

_SLACK_S = 15.0
"""Time, beyond the ranks' grace, to write the result files."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Input of the manifests."""

    backend: KubernetesBackend
    plan: Plan
    config: PodConfig

    @property
    def job(self) -> str:
        """Name of everything that belongs to the run."""
        return self.config.job

    @property
    def labels(self) -> dict[str, str]:
        """Labels of everything that belongs to the run."""
        return {**self.backend.labels, "app.kubernetes.io/name": "launcher", "app.kubernetes.io/instance": self.job}

    @property
    def memory(self) -> str:
        """RAM of a pod."""
        return self.backend.memory_text(self.plan.hosts[0].host)

    def metadata(self) -> Manifest:
        """Return the metadata of an object of the run."""
        return {"name": self.job, "namespace": self.backend.namespace, "labels": self.labels}

    def workload_metadata(self) -> Manifest:
        """Return the metadata of the workload: what a queue and other controllers read besides."""
        queue = {QUEUE_LABEL: self.backend.queue} if self.backend.queue else {}
        return {**self.metadata(), "labels": {**self.labels, **queue}, **self._annotations()}

    def pod_metadata(self) -> Manifest:
        """Return the metadata of the pods."""
        return {"labels": self.labels, **self._annotations()}

    def suspension(self) -> Manifest:
        """Return the field that keeps pods from starting before the queue admits the run."""
        return {"suspend": True} if self.backend.queue else {}

    def _annotations(self) -> Manifest:
        return {"annotations": self.backend.annotations} if self.backend.annotations else {}


def pod_spec(submission: Submission, *, container: str, subdomain: str | None = None) -> Manifest:
    """Return the ``spec`` of the pods.

    Args:
        submission: the run.
        container: name of the container; some controllers look for a certain one.
        subdomain: name of the headless Service, where the controller does not set it.
    """
    backend = submission.backend
    optional: Manifest = {
        "subdomain": subdomain,
        "serviceAccountName": backend.service_account,
        "priorityClassName": backend.priority_class,
        **({"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if backend.host_network else {}),
        "nodeSelector": backend.node_selector,
        "tolerations": list(backend.tolerations),
        "imagePullSecrets": [{"name": name} for name in backend.image_pull_secrets],
    }
    return {
        "restartPolicy": "Never",  # a pod is replaced, so that its controller counts failures
        "terminationGracePeriodSeconds": _grace_s(submission),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # no variables of other services in the namespace
        "securityContext": pod_security(user=backend.run_as_user, group=backend.run_as_group),
        **{key: value for key, value in optional.items() if value},
        "containers": [_container(submission, container)],
        "volumes": _volumes(submission),
    }


def _grace_s(submission: Submission) -> int:
    """Return the seconds between SIGTERM and SIGKILL of a pod.

    Ranks save in them, then files are copied to the store.
    """
    backend, plan = submission.backend, submission.plan
    copying_s = backend.store_grace_s if backend.store else 0.0
    return math.ceil(max(plan.grace_s, plan.preempt_grace_s) + copying_s + _SLACK_S)


def _container(submission: Submission, name: str) -> Manifest:
    backend = submission.backend
    command = (backend.python, "-m", "launcher.backends.kubernetes.entrypoint", MOUNT_PATH)
    return {
        "name": name,
        "image": backend.image,
        "command": [escape_references(word) for word in command],
        **({"envFrom": [{"secretRef": {"name": backend.secret}}]} if backend.secret else {}),
        "env": _variables(submission),
        **({"ports": _ports_of_node(submission)} if backend.host_network else {}),
        "resources": resources(
            cpus=backend.cpus,
            memory=submission.memory,
            gpus=backend.gpus_per_node,
            more={**backend.resources, **backend.rdma},
        ),
        "terminationMessagePolicy": "FallbackToLogsOnError",  # so that `kubectl describe` shows the last block
        # RDMA registers memory with the device, which locks it
        "securityContext": container_security(capabilities=("IPC_LOCK",) if backend.rdma else ()),
        "volumeMounts": [
            {"name": "launcher", "mountPath": MOUNT_PATH, "readOnly": True},
            *temporary_mounts(),
            {"name": "runs", "mountPath": backend.mount},
            *claim_mounts(backend.volumes, is_read_only=False),
        ],
    }


def _variables(submission: Submission) -> list[Manifest]:
    """Return the folders that can be written, and the forwarded variables by name.

    The values of the latter are in the run's Secret.
    """
    forwarded = submission.plan.forwarded_env
    plain = {name: value for name, value in folder_variables(TMP_FOLDER).items() if name not in forwarded}
    return [
        *({"name": name, "value": value} for name, value in plain.items()),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": submission.job, "key": name}}}
            for name in submission.plan.forwarded_env
        ),
    ]


def _ports_of_node(submission: Submission) -> list[Manifest]:
    """Return the ports that pods take of their nodes: a node gets one pod of a run."""
    ports = {"rendezvous": submission.config.identity.port, "session": submission.config.session_port}
    return [{"name": name, "containerPort": port, "hostPort": port} for name, port in ports.items()]


def _volumes(submission: Submission) -> list[Manifest]:
    backend, job = submission.backend, submission.job
    config = {"name": job, "items": [{"key": name, "path": name} for name in (SNAPSHOT_FILE, CONFIG_FILE)]}
    key = {"name": job, "items": [{"key": KEY_FILE, "path": KEY_FILE}]}
    runs: Manifest = {"persistentVolumeClaim": {"claimName": backend.claim}} if backend.claim else {"emptyDir": {}}
    return [
        {"name": "launcher", "projected": {"sources": [{"configMap": config}, {"secret": key}]}},
        {"name": "runs", **runs},
        *temporary_volumes(shared_memory=backend.shared_memory),
        *claim_volumes(backend.volumes, is_read_only=False),
    ]


INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, kw_only=True)
class WorkloadKind:
    """One kind of controller."""

    manifests: Callable[[Submission], list[Manifest]]
    resource: str
    """Kubectl's name with the API group, so that an equal name in another group does not match."""
    others: tuple[str, ...] = ()
    """Further resources that ``manifests`` makes."""
    first_pod: str = f"{INDEX_LABEL}=0"
    """Label of the pod that reports for the run."""
    conditions: tuple[str, str] = ("Complete", "Failed")
    """Its conditions after success and after failure."""


def indexed_job(submission: Submission) -> list[Manifest]:
    """Return an Indexed Job and the headless Service that gives its pods their names."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": submission.metadata(),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the pods resolve each other's names before they are ready
            "selector": {"app.kubernetes.io/instance": submission.job},
        },
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": submission.workload_metadata(),
        "spec": {
            **submission.suspension(),
            **_time_to_live(submission),
            **_job_spec(submission, container="launcher", subdomain=submission.job),
        },
    }
    return [service, job]


def jobset(submission: Submission) -> list[Manifest]:
    """Return a JobSet with one Indexed Job in it; its controller makes the Service."""
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": submission.workload_metadata(),
            "spec": {**submission.suspension(), **_jobset_spec(submission, labels={})},
        }
    ]


def trainjob(submission: Submission) -> list[Manifest]:
    """Return a TrainJob of Kubeflow's Trainer and the runtime that it refers to.

    The runtime has no policy for torch: the agent starts torchrun, with the rendezvous of the plan.
    """
    num_nodes = submission.backend.nodes
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": submission.metadata(),
        "spec": {
            "mlPolicy": {"numNodes": num_nodes},
            "template": {
                "spec": _jobset_spec(submission, labels={"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"})
            },
        },
    }
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": submission.workload_metadata(),
        "spec": {
            **submission.suspension(),
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": submission.job},
            "trainer": {"numNodes": num_nodes},
        },
    }
    return [runtime, job]


def pytorchjob(submission: Submission) -> list[Manifest]:
    """Return a PyTorchJob of Kubeflow's training operator; the first pod is its master."""

    def replicas(count: int) -> Manifest:
        template = {
            "metadata": submission.pod_metadata(),
            "spec": pod_spec(submission, container="pytorch"),
        }
        return {"replicas": count, "restartPolicy": "Never", "template": template}

    num_workers = submission.backend.nodes - 1
    specs = {"Master": replicas(1), **({"Worker": replicas(num_workers)} if num_workers else {})}
    policy = {**submission.suspension(), "cleanPodPolicy": "Running", "backoffLimit": 0, **_time_to_live(submission)}
    return [
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": submission.workload_metadata(),
            "spec": {"runPolicy": policy, "pytorchReplicaSpecs": specs},
        }
    ]


def _time_to_live(submission: Submission) -> Manifest:
    seconds = submission.backend.ttl_s
    return {} if seconds is None else {"ttlSecondsAfterFinished": seconds}


def _jobset_spec(submission: Submission, *, labels: dict[str, str]) -> Manifest:
    group = {
        "name": REPLICATED_JOB,
        "replicas": 1,
        "template": {
            **({"metadata": {"labels": labels}} if labels else {}),
            "spec": _job_spec(submission, container=REPLICATED_JOB),
        },
    }
    return {
        **_time_to_live(submission),
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": submission.job},
        "replicatedJobs": [group],
    }


def _job_spec(submission: Submission, *, container: str, subdomain: str | None = None) -> Manifest:
    """Return an Indexed Job's spec.

    The first pod reports for the run; the others exit with 75 unless it completed. So 75 starts a pod again without
    counting as a failure, and any other code counts once per run.
    """
    num_nodes = submission.backend.nodes
    return {
        "completionMode": "Indexed",
        "completions": num_nodes,
        "parallelism": num_nodes,
        "backoffLimit": submission.backend.restarts,
        "podReplacementPolicy": "Failed",  # never two pods of one index
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"operator": "In", "values": [EXIT_USER_ERROR, EXIT_BAD_INPUT, EXIT_UNFIT]},
                },
                {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [EXIT_PREEMPTED]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {
            "metadata": submission.pod_metadata(),
            "spec": pod_spec(submission, container=container, subdomain=subdomain),
        },
    }


WORKLOADS: dict[Workload, WorkloadKind] = {
    "indexed_job": WorkloadKind(manifests=indexed_job, resource="jobs.batch", others=("services",)),
    "jobset": WorkloadKind(manifests=jobset, resource="jobsets.jobset.x-k8s.io", conditions=("Completed", "Failed")),
    "trainjob": WorkloadKind(
        manifests=trainjob,
        resource="trainjobs.trainer.kubeflow.org",
        others=("trainingruntimes.trainer.kubeflow.org",),
    ),
    "pytorchjob": WorkloadKind(
        manifests=pytorchjob,
        resource="pytorchjobs.kubeflow.org",
        first_pod="training.kubeflow.org/replica-type=master",
        conditions=("Succeeded", "Failed"),
    ),
}
"""Every value of ``backend.workload``."""


def job_reference(backend: KubernetesBackend, job: str) -> dict[str, str]:
    """Return the cluster's names of a run, for ``session.json``."""
    context = {"context": backend.context} if backend.context else {}
    return {"kind": WORKLOADS[backend.workload].resource, "name": job, "namespace": backend.namespace, **context}


def submission_of(backend: KubernetesBackend, plan: Plan, *, plugins: Sequence[str] = ()) -> Submission:
    """Return the input of the manifests of ``plan``.

    Args:
        backend: the options of the cluster.
        plan: what to run.
        plugins: modules of the plugins that the run uses.
    """
    identity = RunIdentity(
        run_id=plan.run_id,
        run_dir=backend.run_dir_on_hosts(plan.run_dir),
        run_hash=plan.run_hash,
        port=plan.port,
    )
    versions = {plugin.module: plugin.version for plugin in plugins_of(plugins) if plugin.version}
    config = PodConfig(job=job_name(plan.name, plan.run_id), identity=identity, plugins=versions)
    return Submission(backend=backend, plan=plan, config=config)


def render_manifests(submission: Submission, *, snapshot: str) -> str:
    """Return every manifest as YAML; its size does not depend on the number of hosts.

    Args:
        submission: the run.
        snapshot: the text of run.yaml.
    """
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": submission.metadata(),
        "immutable": True,
        "data": {SNAPSHOT_FILE: snapshot, CONFIG_FILE: submission.config.dump()},
    }
    objects = [config, *WORKLOADS[submission.backend.workload].manifests(submission)]
    head = "".join(f"# {line}\n" for line in _remarks(submission))
    return head + "".join(f"---\n{manifest_text(manifest)}" for manifest in objects)


def _remarks(submission: Submission) -> Iterator[str]:
    backend, job = submission.backend, submission.job
    yield f"Run {submission.plan.name} · {submission.plan.run_id} has the name {job} in the cluster."
    run_dir = submission.config.identity.run_dir
    there = f"with a copy in {store_folder(backend.store, run_dir)}" if backend.store else ""
    lost = "deleted with the pods (no backend.claim)"
    kept = f"on the claim {backend.claim}" if backend.claim else lost if there else f"{lost}: only logs are kept"
    yield f"Run directory in the pods: {', '.join(filter(None, (run_dir, kept, there)))}."
    estimated = "of the estimate" if submission.plan.memory else "of a run without an estimate"
    if backend.memory == "auto":
        yield f"Each pod gets {submission.memory} of RAM, the amount {estimated}; backend.memory sets another."
    if backend.queue:
        yield f"The run is suspended until Kueue admits it from the queue {backend.queue} (backend.queue)."
    yield from _outside_restricted(backend)
    if "plugins" in submission.plan.details:
        yield f"The image must hold the plugins of the run: {submission.plan.details['plugins']}."
    keys = ", ".join((KEY_FILE, *submission.plan.forwarded_env))
    yield f"Besides, the Secret {job} is created over stdin, with {keys}; it is deleted with the run."


def _outside_restricted(backend: KubernetesBackend) -> Iterator[str]:
    """Yield what PodSecurity's levels "restricted" and "baseline" refuse in the pods."""
    asked = {"backend.rdma (capability IPC_LOCK)": bool(backend.rdma), "backend.host_network": backend.host_network}
    if names := " and ".join(name for name, is_asked in asked.items() if is_asked):
        yield f"Outside PodSecurity's levels restricted and baseline: {names}. The namespace must be privileged."
    if backend.rdma and backend.run_as_user:
        yield (
            f"IPC_LOCK is for root alone: as user {backend.run_as_user}, pods lock memory for RDMA where the nodes' "
            "container runtime sets no limit (memlock); backend.run_as_user=0 needs no such setting."
        )
