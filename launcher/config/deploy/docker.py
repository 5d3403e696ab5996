"""Options of ``deploy=docker``: the image of a server, for docker, podman or buildah."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.deploy.base import MountingDeploy, UnusedOptions
from launcher.config.kubernetes_objects import validate_image
from launcher.config.quantization import METHODS
from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.protocol.plan import Plan

_TORCH_BUILD = re.compile(r"cpu|cu\d{3}|rocm\d(\.\d)+|xpu")
EXTRAS_OF_TRACKERS = ("mlflow", "prometheus", "tensorboard")
"""Trackers whose packages the extra of the same name installs."""


@dataclass(frozen=True, kw_only=True)
class DockerDeploy(MountingDeploy):
    """``Containerfile`` and what it copies: this program, pinned packages and the run."""

    kind: ClassVar[str] = "docker"
    summary_fields: ClassVar[tuple[str, ...]] = ("out", "image", "torch_build")

    torch_build: str = "cpu"
    """Build of torch, as uv names it: ``cpu``, ``cu126``, ``cu128``, ``cu130`` …"""

    base_image: str | None = None
    """Image with Python that it is built from.
    ``null`` takes Debian's slim image of the Python that runs here; give one with a digest to pin it."""

    run_as_user: int = 1000
    """User and group id in the container; never root."""

    host: str = "127.0.0.1"
    """Address of this machine on which the command in the file publishes the port."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject builds and images that are none, and root."""
        yield from super().validate()
        if not _TORCH_BUILD.fullmatch(self.torch_build):
            yield self.error("torch_build", "is no build of torch", "set deploy.torch_build=cpu, or cu128 for GPUs")
        elif self.gpus and self.torch_build == "cpu":
            fix = "set deploy.torch_build=cu128, or what your driver runs"
            yield self.error("torch_build", f"computes on no GPU, and deploy.gpus is {self.gpus}", fix)
        if self.base_image is not None:
            yield from validate_image("deploy.base_image", self.base_image, logins="docker login")
        if self.run_as_user < 1:
            yield self.error("run_as_user", "is root", "set deploy.run_as_user=1000")

    def unused_options(self, run: Run) -> Iterator[UnusedOptions]:
        """Add the interpreter: the image that is built has one."""
        yield from super().unused_options(run)
        why = "the image is built around its own interpreter, which is called python"
        yield UnusedOptions(("python",), why, "set deploy.base_image=IMAGE for another Python")

    def validate_run(self, run: Run, plan: Plan) -> Iterator[ConfigError]:
        """Reject an engine that needs an image of its own."""
        yield from super().validate_run(run, plan)
        if getattr(run.job, "engine", None) == "vllm":
            why = "needs vLLM's own image with this program in it"
            yield ConfigError("job.engine", "vllm", why=why, fix="set job.engine=paged, or deploy=kubernetes")


def extras(run: Run) -> tuple[str, ...]:
    """Return the extras of this program that a server needs."""
    found = ["serve"]
    method = METHODS.get(run.model.quantization)
    manifest = run.model.quantization_manifest()
    if manifest is not None or (method is not None and method.package is not None):
        found.append("quantize")
    if run.precision.kind == "fp8":
        found.append("fp8")
    found += [each.kind for each in run.tracker.members if each.kind in EXTRAS_OF_TRACKERS]
    return tuple(found)
