"""The submission as text: what ``kubectl apply`` gets, whole, with what a reader must know above it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.backends.kubernetes.names import job_name
from launcher.backends.kubernetes.orders import KEY, ORDERS, SNAPSHOT, PodOrders
from launcher.backends.kubernetes.pods import Manifest, Submission
from launcher.backends.kubernetes.workloads import WORKLOADS
from launcher.plan import Identity

if TYPE_CHECKING:
    from launcher.backends.kubernetes.backend import Kubernetes
    from launcher.plan import Plan


def submission_of(backend: Kubernetes, plan: Plan) -> Submission:
    """Return what the manifests of ``plan`` are made from."""
    identity = Identity(
        run_id=plan.run_id,
        run_dir=backend.run_dir_on_hosts(plan.run_dir),
        run_hash=plan.run_hash,
        port=plan.port,
    )
    orders = PodOrders(job=job_name(plan.name, plan.run_id), identity=identity)
    return Submission(backend=backend, plan=plan, orders=orders)


def render_manifests(submission: Submission, *, snapshot: str) -> str:
    """Return every manifest as YAML. Its size does not depend on the number of hosts.

    Args:
        submission: the run.
        snapshot: the text of run.yaml.
    """
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": submission.metadata(),
        "immutable": True,
        "data": {SNAPSHOT: snapshot, ORDERS: submission.orders.dump()},
    }
    objects = [config, *WORKLOADS[submission.backend.workload].manifests(submission)]
    head = "".join(f"# {line}\n" for line in _remarks(submission))
    return head + "".join(f"---\n{_yaml(manifest)}" for manifest in objects)


def _remarks(submission: Submission) -> Iterator[str]:
    backend, job = submission.backend, submission.job
    yield f"Run {submission.plan.name} · {submission.plan.run_id} is called {job} in the cluster."
    where = f"on the claim {backend.claim}" if backend.claim else "gone with the pods (backend.claim): only logs remain"
    yield f"Run directory in the pods: {submission.orders.identity.run_dir}, {where}."
    keys = ", ".join((KEY, *submission.plan.forward))
    yield f"Besides, the Secret {job} is created over stdin, with {keys}; it is deleted with the run."


def _yaml(manifest: Manifest) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Without anchors, and with texts of several lines as they are."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    dumped: str = yaml.dump(manifest, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return dumped
