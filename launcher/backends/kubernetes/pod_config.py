"""The folder mounted into every pod (snapshot, pod config, key), and names in the cluster."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from launcher.config.backend.kubernetes import Workload
from launcher.config.kubernetes_objects import dashed
from launcher.errors import ConfigError, ConfigErrors, EnvironmentProblem
from launcher.protocol.plan import RunIdentity
from launcher.utils.files import read_json
from launcher.utils.schema import build, to_tree

REPLICATED_JOB = "node"
"""Name of the only group of pods in a JobSet; Kubeflow's Trainer requires it."""
_MAX_LABEL = 63
_LONGEST_SUFFIX = len(f"-{REPLICATED_JOB}-0-99999")


def job_name(run_name: str, run_id: str) -> str:
    """Return the name of every object of one run: a DNS label that begins with a letter.

    Invalid characters are replaced by dashes, and the name is cut so that the host name of every pod is a DNS label
    too. The run id keeps names unique that become equal.
    """
    tail = dashed(run_id)
    room = _MAX_LABEL - _LONGEST_SUFFIX - len(tail) - 1
    head = dashed(run_name)[:room].strip("-")
    if not head or not head[0].isalpha():
        head = f"run-{head}"[:room].strip("-")
    return f"{head}-{tail}"


def pod_address(workload: Workload, job: str, index: int) -> str:
    """Return the DNS name of the pod with ``index``, as its controller arranges it.

    In a PyTorchJob only the first pod has one; nothing connects to the others.
    """
    match workload:
        case "indexed_job":
            return f"{job}-{index}.{job}"
        case "jobset" | "trainjob":
            return f"{job}-{REPLICATED_JOB}-0-{index}.{job}"
        case "pytorchjob":
            return f"{job}-master-0" if index == 0 else f"{job}-worker-{index - 1}"


MOUNT_PATH = "/run/launcher"
"""Where the folder is mounted."""
SNAPSHOT_FILE = "run.yaml"
CONFIG_FILE = "pod.json"
KEY_FILE = "key"
"""Name of the file, and of the entry in the Secret."""


@dataclass(frozen=True, kw_only=True)
class PodConfig:
    """Options of the pods beside the snapshot; each pod makes the plan from both."""

    job: str
    """Name of the run in the cluster; addresses follow from it."""
    identity: RunIdentity
    plugins: dict[str, str] = field(default_factory=dict)
    """Versions of the run's plugins by module, as installed on the machine that submits it."""

    @property
    def session_port(self) -> int:
        """Port on which the first pod listens for the others: next to the port of the rendezvous."""
        port = self.identity.port
        return port + 1 if port < 65535 else port - 1

    def dump(self) -> str:
        """Return the text of ``pod.json``."""
        tree = {name: value for name, value in to_tree(self).items() if value}  # most runs have no plugins
        return json.dumps(tree, separators=(",", ":"))


def load_pod_config(folder: Path) -> PodConfig:
    """Return the configuration in ``folder``.

    Raises:
        EnvironmentProblem: the folder holds none.
        ConfigErrors: they were not written by this version.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise EnvironmentProblem(
            f"{path} does not exist: this is the entry point of a pod that `backend=kubernetes` creates"
        )
    mistakes: list[ConfigError] = []
    config = build(PodConfig, read_json(path), path="config", report=mistakes.append)
    if config is None:
        raise ConfigErrors(mistakes)
    return config


def load_key(folder: Path) -> bytes:
    """Return the key of the run."""
    return (folder / KEY_FILE).read_bytes()
