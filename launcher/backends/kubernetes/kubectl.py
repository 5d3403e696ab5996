"""Run kubectl: argument lists, documents over stdin, and errors with a remedy."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import EnvironmentProblem

_TIMEOUT_S = 120.0
_UNREACHABLE = re.compile(r"dial tcp [^;\"\n]*")
_REMEDIES = (
    ("context was not found", "", "`kubectl config get-contexts` lists the existing ones; set backend.context"),
    ("does not exist", "context", "`kubectl config get-contexts` lists the existing ones; set backend.context"),
    ("no matches for kind", "", "its controller is not installed in this cluster; set backend.workload=indexed_job"),
    ("not found", "namespaces", "create it with `kubectl create namespace`, or set backend.namespace"),
    (
        "forbidden",
        "exceeded quota",
        "request fewer resources: backend.nodes, backend.gpus_per_node, backend.cpus, backend.memory",
    ),
    ("forbidden", "", "ask the cluster's administrator for this permission; `kubectl auth can-i --list` shows yours"),
    ("unauthorized", "", "log in to the cluster again"),
    ("must be logged in", "", "log in to the cluster again"),
    ("refused", "", "`kubectl cluster-info` must work first; check that this is the right cluster (backend.context)"),
    (
        "unable to connect",
        "",
        "`kubectl cluster-info` must work first; check that this is the right cluster (backend.context)",
    ),
    (
        "no such host",
        "",
        "`kubectl cluster-info` must work first; check that this is the right cluster (backend.context)",
    ),
)
"""Two phrases of a kubectl message, in lower case, and the remedy.
The first entry that matches is used."""


@dataclass(frozen=True, kw_only=True)
class Kubectl:
    """kubectl for one namespace."""

    namespace: str
    context: str | None
    group: str = "backend"
    """Config group of the options that errors name."""

    def argv(self, *words: str) -> list[str]:
        """Return the whole command line."""
        context = [f"--context={self.context}"] if self.context else []
        return ["kubectl", *context, f"--namespace={self.namespace}", *words]

    def run(
        self, *words: str, document: str = "", timeout_s: float = _TIMEOUT_S, accepts: Container[int] = (0,)
    ) -> str:
        """Run a command and return what it prints.

        Args:
            words: its arguments.
            document: its stdin.
            timeout_s: seconds until it has to end.
            accepts: exit codes that are no failure.

        Raises:
            EnvironmentProblem: kubectl is missing, times out, or fails.
        """
        argv = self.argv(*words)
        try:
            done = subprocess.run(argv, input=document, capture_output=True, text=True, timeout=timeout_s, check=False)
        except FileNotFoundError as error:
            raise kubectl_missing(self.group) from error
        except subprocess.TimeoutExpired as error:
            raise EnvironmentProblem(f"`{_shown(argv)}` did not end within {timeout_s:.0f} s") from error
        if done.returncode not in accepts:
            said = _once(done.stderr.strip()) or f"exit code {done.returncode}"
            remedy = _remedy(said).replace("backend.", f"{self.group}.")
            raise EnvironmentProblem(f"`{_shown(argv)}` failed: {said}; {remedy}")
        return done.stdout

    def get(self, *words: str) -> Any:
        """Return an object, or a list of objects."""
        return _parsed(self.run("get", *words, "--output=json"), words)

    def find(self, what: str) -> Any | None:
        """Return an object; ``None`` if it does not exist."""
        text = self.run("get", what, "--ignore-not-found", "--output=json")
        return _parsed(text, (what,)) if text.strip() else None


def _parsed(text: str, words: Sequence[str]) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        said = f"`kubectl get {shlex.join(words)}` printed invalid JSON: {text[:200]!r}"
        raise EnvironmentProblem(f"{said}; check that kubectl is the program and not a wrapper") from error


def kubectl_missing(group: str = "backend") -> EnvironmentProblem:
    """Return the error for a machine without kubectl, for users of a config group."""
    user = "backend=kubernetes starts everything" if group == "backend" else "launch deploy applies manifests"
    printed = "print the manifests with `launch plan`" if group == "backend" else "copy the folder of manifests"
    return EnvironmentProblem(
        f"kubectl is not installed, and {user} with it: see https://kubernetes.io/docs/tasks/tools/, or {printed} and "
        "apply them elsewhere"
    )


def _shown(argv: Sequence[str]) -> str:
    return " ".join(argv)


def _once(said: str) -> str:
    """Return once why no cluster answers, which kubectl repeats; other messages whole."""
    reasons = set(_UNREACHABLE.findall(said)) if "\n" in said else set()
    return reasons.pop() if len(reasons) == 1 else said


def _remedy(said: str) -> str:
    small = said.lower()
    known = (remedy for one, other, remedy in _REMEDIES if one in small and other in small)
    return next(known, "this command must work by hand first")
