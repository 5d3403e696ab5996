"""``Containerfile`` and what it copies, for ``deploy=docker``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import launcher
from launcher.config.deploy.base import keys_path, mounted_paths
from launcher.config.deploy.docker import DockerDeploy, extras
from launcher.config.deploy.proxy import bracketed, served_job
from launcher.config.run import Run
from launcher.config.snapshot import dump_run
from launcher.deploy.container_run import RUNS_FOLDER, container_run
from launcher.deploy.packages import bill_of_materials, needed_packages, program_wheel
from launcher.deploy.proxy import LIVENESS_PATH
from launcher.protocol.plan import Plan
from launcher.utils.text import one_line, shell_command

CONTAINERFILE = "Containerfile"
_UV = "0.13.9"
"""Version of the installer, which knows where torch publishes its builds."""
_PREFIX = "/opt/launcher"
_CACHE_FOLDER = "/cache"
_SERVER_FOLDER = "server"
_SBOM = "sbom.cdx.json"
_START_S = 600
"""Time for loading, in which a failed check of health does not count."""


def render(run: Run, plan: Plan) -> dict[str, str | bytes]:
    """Return ``Containerfile``, versions of packages, the run, and this program as a wheel."""
    deploy = run.deploy
    assert isinstance(deploy, DockerDeploy), deploy.kind
    packages = needed_packages(extras(run))
    name, wheel = program_wheel()
    copied = [f"{_SERVER_FOLDER}/", "requirements.txt", _SBOM, name]
    return {
        CONTAINERFILE: containerfile(run, deploy, plan, wheel=name),
        ".dockerignore": "".join(["*\n", *(f"!{each}\n" for each in copied)]),
        "requirements.txt": "".join(f"{each.pin}\n" for each in packages),
        _SBOM: json.dumps(bill_of_materials(packages, version=launcher.__version__), indent=1) + "\n",
        f"{_SERVER_FOLDER}/run.yaml": dump_run(container_run(run, names=("localhost", "127.0.0.1"))),
        name: wheel,
    }


def containerfile(run: Run, deploy: DockerDeploy, plan: Plan, *, wheel: str) -> str:
    """Return the text of ``Containerfile``."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    base = deploy.base_image or f"python:{python}-slim-bookworm"
    user = f"{deploy.run_as_user}:{deploy.run_as_user}"
    labels = {
        "org.opencontainers.image.title": deploy.object_name(run),
        "org.opencontainers.image.description": f"{launcher.__name__} serving {served_job(run).name_of(run)}",
        "org.opencontainers.image.version": launcher.__version__,
        "org.opencontainers.image.base.name": base,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "launcher.sbom": f"{_PREFIX}/{_SBOM}",
        "launcher.torch": deploy.torch_build,
    }
    environment = {
        "PATH": f"{_PREFIX}/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/tmp",  # noqa: S108 (in the container)
        "HF_HOME": _CACHE_FOLDER,
        "XDG_CACHE_HOME": _CACHE_FOLDER,
        "PYTHONUNBUFFERED": "1",
    }
    if deploy.torch_build.startswith("cu"):
        environment |= {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    return f"""\
# Image of a server, written by launch deploy. In this folder type:
#
#   {shell_command(["podman", "build", "--format", "docker", "--file", CONTAINERFILE, "--tag", deploy.image, "."])}
#   {shell_command(run_command(run, deploy, plan, program="podman"))}
#
# or docker in place of podman, without --format. Behind a mirror, where torch's own index cannot be reached, add
# --build-arg 'TORCH_FROM=--default-index=URL' to the first.
FROM {base} AS build
ARG TORCH_FROM=--torch-backend={deploy.torch_build}
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1 UV_SYSTEM_CERTS=1 UV_COMPILE_BYTECODE_TIMEOUT=600 \\
  DS_BUILD_OPS=0
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv=={_UV} \\
  && python3 -m venv --without-pip {_PREFIX}
COPY requirements.txt /build/
# TORCH_FROM may be several words.
# hadolint ignore=SC2086
RUN /opt/uv/bin/uv pip install --python {_PREFIX}/bin/python ${{TORCH_FROM}} --requirements /build/requirements.txt
COPY {wheel} /build/
RUN /opt/uv/bin/uv pip install --python {_PREFIX}/bin/python --no-deps /build/{wheel}

FROM {base}
# The engine compiles its kernels for the processor that it finds. Debian keeps one version of a package: none is named.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \\
  && install --directory --owner={deploy.run_as_user} --group={deploy.run_as_user} {RUNS_FOLDER} {_CACHE_FOLDER}
COPY --from=build {_PREFIX} {_PREFIX}
COPY {_SBOM} {_PREFIX}/
COPY {_SERVER_FOLDER} {_PREFIX}/{_SERVER_FOLDER}
{_assignments("ENV", environment)}
{_assignments("LABEL", labels)}
USER {user}
WORKDIR {RUNS_FOLDER}
VOLUME ["{RUNS_FOLDER}", "{_CACHE_FOLDER}"]
EXPOSE {served_job(run).port}
HEALTHCHECK --interval=5s --timeout=5s --start-period={_START_S}s --retries=3 \\
  CMD {json.dumps(["python", "-c", _health_check(run)])}
CMD {json.dumps(["python", "-m", "launcher", "rerun", f"{_PREFIX}/{_SERVER_FOLDER}"])}
"""


def run_command(run: Run, deploy: DockerDeploy, plan: Plan, *, program: str) -> list[str]:
    """Return the command that starts the server: docker's and podman's options are the same."""
    job = served_job(run)
    mounted = [*mounted_paths(run), *(path for _, path in keys_path(run))]
    gpus = ["--gpus", str(deploy.gpus)] if deploy.gpus else []
    return [
        *(program, "run", "--rm", "--init", "--read-only", "--tmpfs=/tmp"),
        *("--cap-drop=all", "--security-opt=no-new-privileges"),
        f"--cpus={deploy.cpus}",
        f"--memory={deploy.memory_bytes(run, plan)}",
        *gpus,
        f"--stop-timeout={round(job.shutdown_grace_s)}",
        f"--publish={bracketed(deploy.host, job.port)}:{job.port}",
        f"--volume={deploy.object_name(run)}-runs:{RUNS_FOLDER}",
        f"--volume={deploy.object_name(run)}-cache:{_CACHE_FOLDER}",
        *(f"--volume={path}:{path}:ro" for path in mounted),
        deploy.image,
    ]


def _health_check(run: Run) -> str:
    url = f"http://127.0.0.1:{served_job(run).port}{LIVENESS_PATH}"
    return f"import urllib.request; urllib.request.urlopen({url!r}, timeout=4)"


def _assignments(instruction: str, values: dict[str, str]) -> str:
    lines: Sequence[str] = [f"{name}={_quoted(value)}" for name, value in values.items()]
    return f"{instruction} " + " \\\n  ".join(lines)


def _quoted(value: str) -> str:
    """Return a value on one line in double quotes, in which nothing is replaced."""
    return '"' + "".join(f"\\{letter}" if letter in '\\"$' else letter for letter in one_line(value)) + '"'
