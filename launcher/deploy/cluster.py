"""Apply the folder of a deployment to a cluster, show its state there, and delete it.

kubectl and helm do it, with the login of the user; they get argument lists, never a shell.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.backends.kubernetes.kubectl import Kubectl
from launcher.config.deploy.helm import HelmDeploy
from launcher.config.deploy.kubernetes import KubernetesDeploy
from launcher.config.run import Run
from launcher.config.snapshot import load_run
from launcher.deploy.container_run import SNAPSHOT_FILE
from launcher.deploy.folder import LIST, changed_files, listed, load_list
from launcher.deploy.kubernetes.server import VERSION_LABEL
from launcher.deploy.kubernetes.traffic import ROUTES, route_shares
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.utils.text import format_table

Say = Callable[[str], object]
_MANIFESTS, _CHART = "manifests", "chart"
_AGAIN = "render it again: launch deploy … deploy.out=DIR"
AS_LAUNCHER = ("--server-side", "--field-manager=launcher")
"""The server merges, and refuses to change what others set (``kubectl scale``)."""
_SLACK_S = 120.0
"""Time to place a pod and pull its image, beyond the start of a server."""
_CHANGED = 1
"""Exit code of ``kubectl diff`` for a difference."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A rendered folder and the cluster that it is for."""

    folder: Path
    run: Run
    deploy: KubernetesDeploy

    @property
    def name(self) -> str:
        """Name of what all versions share; of the release of a chart too."""
        return self.deploy.object_name(self.run)

    @property
    def versioned(self) -> str:
        """Name of what this version has for itself."""
        return f"{self.name}-{self.deploy.version}"

    @property
    def kubectl(self) -> Kubectl:
        """The program for its namespace."""
        return Kubectl(namespace=self.deploy.namespace, context=self.deploy.context, group="deploy")

    @property
    def is_chart(self) -> bool:
        """Whether helm applies it."""
        return isinstance(self.deploy, HelmDeploy)

    @property
    def selector(self) -> str:
        """Selects the objects of this version."""
        return f"app.kubernetes.io/name={self.name},app.kubernetes.io/version={self.deploy.version}"

    @property
    def rollout_s(self) -> float:
        """Seconds that a rollout may take: pods are replaced one after the other."""
        return self.deploy.replicas * (self.deploy.startup_s(self.run) + _SLACK_S)

    def argv_of_helm(self, *words: str) -> list[str]:
        """Return a whole command line of helm."""
        context = [f"--kube-context={self.deploy.context}"] if self.deploy.context else []
        return ["helm", *context, f"--namespace={self.deploy.namespace}", *words]


def load_rendered(folder: Path) -> Run:
    """Return the run from which ``launch deploy`` rendered ``folder``.

    Raises:
        ConfigError: it holds none.
    """
    snapshot = folder / SNAPSHOT_FILE
    if folder.is_file():
        raise ConfigError("DIR", folder, why="is a file", fix="name the folder that launch deploy wrote, deploy.out")
    if not snapshot.is_file():
        why = f"holds no {SNAPSHOT_FILE}, which launch deploy writes"
        raise ConfigError("DIR", folder, why=why, fix="render it first: launch deploy … deploy.out=DIR")
    if SNAPSHOT_FILE not in listed(folder):
        why = f"lacks {LIST} with {SNAPSHOT_FILE} in it, so launch deploy cannot know what it wrote"
        raise ConfigError("DIR", folder, why=why, fix=_AGAIN)
    if changed_files(folder, [SNAPSHOT_FILE]):
        why = f"its {SNAPSHOT_FILE}, which names cluster and namespace, was changed since launch deploy wrote it"
        raise ConfigError("DIR", folder, why=why, fix=f"move it away, change options instead, and {_AGAIN}")
    return load_run(snapshot)


def open_deployment(folder: Path) -> Deployment:
    """Return the deployment that ``launch deploy`` rendered into ``folder``.

    Raises:
        ConfigError: it holds none, or one that is not for a cluster.
    """
    run = load_rendered(folder)
    if not isinstance(run.deploy, KubernetesDeploy):
        why = f"holds deploy={run.deploy.kind}, which no cluster takes"
        raise ConfigError("DIR", folder, why=why, fix="name a folder of deploy=kubernetes or deploy=helm")
    if missing := [path for path in listed(folder) if not (folder / path).is_file()]:
        why = f"lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}, which launch deploy wrote"
        raise ConfigError("DIR", folder, why=why, fix=_AGAIN)
    return Deployment(folder=folder, run=run, deploy=run.deploy)


def check_files(deployment: Deployment) -> Iterator[str]:
    """Yield a line for each file that the user changed or added.

    Changed ones are used as they are, added ones left out.

    Raises:
        ConfigError: the files are partly those of a write that was cut short.
    """
    folder = deployment.folder
    listing = load_list(folder)
    if listing.writing:
        why = "the last launch deploy that wrote it was interrupted"
        raise ConfigError("DIR", folder, why=why, fix="run that command again: it writes the rest")
    own = _own_files(deployment)
    for path in changed_files(folder, own):
        yield f"{folder / path} was changed since launch deploy wrote it, and is used as it is"
    for found in sorted((folder / (_CHART if deployment.is_chart else _MANIFESTS)).rglob("*")):
        if found.is_file() and str(found.relative_to(folder)) not in own:
            yield f"{found} was not written by launch deploy, and is left out"


def _own_files(deployment: Deployment) -> list[str]:
    """Return the manifests, or the files of the chart, that launch deploy wrote, by name."""
    parent = f"{_CHART if deployment.is_chart else _MANIFESTS}/"
    return sorted(path for path in listed(deployment.folder) if path.startswith(parent))


def _filenames(deployment: Deployment) -> list[str]:
    """Return kubectl's arguments that name the manifests."""
    return [f"--filename={deployment.folder / path}" for path in _own_files(deployment)]


@contextmanager
def chart_copy(deployment: Deployment) -> Iterator[str]:
    """Yield a copy of the chart without files of others, which helm would read too."""
    with tempfile.TemporaryDirectory(prefix="launch-chart-") as copy:
        for path in _own_files(deployment):
            target = Path(copy) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(deployment.folder / path, target)
        yield str(Path(copy) / _CHART)


def apply(deployment: Deployment, say: Say) -> None:
    """Apply everything and wait until the new pods serve; if they do not, undo the rollout.

    The server checks all objects before the first one is changed.

    Raises:
        EnvironmentProblem: there is no cluster, it refuses an object (nothing was changed then), or the new pods do not
            get ready in time.
    """
    if deployment.is_chart:
        seconds = f"--timeout={deployment.rollout_s:.0f}s"
        with chart_copy(deployment) as chart:
            words = ("upgrade", deployment.name, chart, "--install")
            _helm(deployment, *words, "--rollback-on-failure", "--wait", seconds)
        say(f"release {deployment.name} is in {deployment.deploy.namespace}")
        return
    kubectl, files = deployment.kubectl, _filenames(deployment)
    kubectl.run("apply", *AS_LAUNCHER, "--dry-run=server", *files)
    _check_baseline(deployment)
    is_new = not _exists(deployment)
    for line in kubectl.run("apply", *AS_LAUNCHER, *files).splitlines():
        say(line)
    _wait_for_rollout(deployment, is_new=is_new)
    say(f"{_workload(deployment)} serves in {deployment.deploy.namespace}")


def _check_baseline(deployment: Deployment) -> None:
    """Raise if requests would go to a baseline that is not there."""
    baseline, deploy = deployment.deploy.baseline, deployment.deploy
    if baseline is not None and deploy.shares.get(baseline, 0) and baseline not in versions(deployment):
        why = f"{deployment.name}-{baseline} is not in {deploy.namespace}, and would get {deploy.shares[baseline]} %"
        why += " of the requests"
        fix = "apply it first, or render this version without deploy.baseline and deploy.weights"
        raise ConfigError("deploy.baseline", baseline, why=why, fix=fix)


def versions(deployment: Deployment) -> dict[str, int]:
    """Return the versions whose workload is in the cluster, with the number of ready pods.

    Raises:
        EnvironmentProblem: there is no cluster.
    """
    selector = f"--selector=app.kubernetes.io/name={deployment.name}"
    found: dict[str, int] = {}
    for item in deployment.kubectl.get("deployments.apps,statefulsets.apps", selector)["items"]:
        version = item["metadata"].get("labels", {}).get(VERSION_LABEL, "")
        found[version] = found.get(version, 0) + item.get("status", {}).get("readyReplicas", 0)
    return found


def _wait_for_rollout(deployment: Deployment, *, is_new: bool) -> None:
    kubectl, workload = deployment.kubectl, _workload(deployment)
    try:
        seconds = deployment.rollout_s
        kubectl.run("rollout", "status", workload, f"--timeout={seconds:.0f}s", timeout_s=seconds + _SLACK_S)
    except EnvironmentProblem as problem:
        if is_new:
            raise
        kubectl.run("rollout", "undo", workload)
        raise EnvironmentProblem(f"{problem}; {workload} goes back to the revision before") from problem


def difference(deployment: Deployment) -> str:
    """Return what ``apply`` would change, by a dry run of the server; may be empty.

    Raises:
        EnvironmentProblem: there is no cluster, or it refuses an object.
    """
    if deployment.is_chart:
        with chart_copy(deployment) as chart:
            rendered = _helm(deployment, "template", deployment.name, chart)
        return deployment.kubectl.run("diff", *AS_LAUNCHER, "--filename=-", document=rendered, accepts=(0, _CHANGED))
    return deployment.kubectl.run("diff", *AS_LAUNCHER, *_filenames(deployment), accepts=(0, _CHANGED))


def status(deployment: Deployment) -> list[str]:
    """Return the lines that show the workloads and pods of all versions.

    Raises:
        EnvironmentProblem: there is no cluster.
    """
    found = deployment.kubectl.get(
        "deployments.apps,statefulsets.apps,pods", f"--selector=app.kubernetes.io/name={deployment.name}"
    )
    rows = [row for item in found["items"] for row in _rows(item)]
    if not rows:
        return [f"nothing of {deployment.name} is in {deployment.deploy.namespace}"]
    return list(format_table([("object", "version", "ready", "state"), *rows]))


def _rows(item: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    meta, state = item["metadata"], item.get("status", {})
    version = meta.get("labels", {}).get("app.kubernetes.io/version", "")
    name = f"{item['kind'].lower()}/{meta['name']}"
    if item["kind"] != "Pod":
        wanted, ready = item["spec"].get("replicas", 1), state.get("readyReplicas", 0)
        yield name, version, f"{ready}/{wanted}", f"{state.get('updatedReplicas', 0)} of the newest revision"
        return
    containers = state.get("containerStatuses", [])
    restarts = sum(each.get("restartCount", 0) for each in containers)
    waiting = next((why for each in containers if (why := each.get("state", {}).get("waiting", {}).get("reason"))), "")
    ready = f"{sum(bool(each.get('ready')) for each in containers)}/{len(containers)}"
    yield name, version, ready, f"{waiting or state.get('phase', 'Unknown')}, {restarts} restarts"


def delete(deployment: Deployment, say: Say) -> None:
    """Delete the objects of this version, and shared ones that no other version uses.

    Raises:
        EnvironmentProblem: there is no cluster, or this version gets requests beside another one.
    """
    if deployment.is_chart:
        _helm(deployment, "uninstall", deployment.name, "--ignore-not-found", "--wait")
        say(f"release {deployment.name} is deleted")
        return
    kubectl = deployment.kubectl
    others = sorted(versions(deployment).keys() - {deployment.deploy.version})
    if others:
        _check_without_requests(deployment, others)
    paths = _deletable(deployment, keeps_shared=bool(others))
    gone = kubectl.run("delete", "--ignore-not-found", *(f"--filename={path}" for path in paths))
    # earlier snapshots, to which a rollout could go back
    gone += kubectl.run("delete", "configmaps", "--ignore-not-found", f"--selector={deployment.selector}")
    for line in gone.splitlines():
        say(line)
    if others:
        say(f"kept what {', '.join(f'{deployment.name}-{each}' for each in others)} uses too")


def _check_without_requests(deployment: Deployment, others: Sequence[str]) -> None:
    """Raise if a route still leads to this version."""
    if deployment.deploy.traffic == "none":
        return
    resource, _ = ROUTES[deployment.deploy.traffic]
    words = ("get", f"{resource}/{deployment.name}", "--ignore-not-found", "--output=json")
    text = deployment.kubectl.run(*words)
    share = route_shares(json.loads(text) if text.strip() else {}, deployment.name).get(deployment.deploy.version, 0)
    if share:
        why = f"{deployment.versioned} gets {share} % of the requests, beside {', '.join(others)}"
        fix = "launch deploy rollback DIR, or promote of the other version, comes first"
        raise EnvironmentProblem(f"{why}: {fix}")


def _deletable(deployment: Deployment, *, keeps_shared: bool) -> Iterator[Path]:
    """Yield the manifests of the objects that go with this version."""
    for path in (deployment.folder / each for each in _own_files(deployment)):
        labels = yaml.safe_load(path.read_text(encoding="utf-8"))["metadata"]["labels"]
        if not keeps_shared or VERSION_LABEL in labels:
            yield path


def _workload(deployment: Deployment) -> str:
    """Return kubectl's name of the workload that was rendered."""
    is_stateful = f"{_MANIFESTS}/statefulset.yaml" in listed(deployment.folder)
    return f"{'statefulset' if is_stateful else 'deployment'}/{deployment.versioned}"


def _exists(deployment: Deployment) -> bool:
    """Return whether the workload is in the cluster already."""
    return bool(deployment.kubectl.run("get", _workload(deployment), "--ignore-not-found", "--output=name").strip())


def _helm(deployment: Deployment, *words: str) -> str:
    """Run helm and return what it prints.

    Raises:
        EnvironmentProblem: helm is missing or fails.
    """
    argv = deployment.argv_of_helm(*words)
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=deployment.rollout_s + 2 * _SLACK_S, check=False
        )
    except FileNotFoundError as error:
        fix = "see https://helm.sh/docs/intro/install/, or set deploy=kubernetes"
        raise EnvironmentProblem(f"helm is not installed, and deploy=helm is applied with it: {fix}") from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"`{_shown(argv)}` did not end in time") from error
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        fix = "`kubectl cluster-info` must work first; deploy.context and deploy.namespace choose the cluster"
        raise EnvironmentProblem(f"`{_shown(argv)}` failed: {said}; {fix}")
    return done.stdout


def _shown(argv: Sequence[str]) -> str:
    return " ".join(argv)
