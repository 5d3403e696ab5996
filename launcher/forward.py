"""Which variables of the environment that launches a run reach the hosts.

An allow-list: what is not named stays here. A host has an environment of its own, and most of what a shell holds
(PATH, HOME, DISPLAY, SSH_AUTH_SOCK) is right on one machine only. Left out on purpose:

- CUDA_VISIBLE_DEVICES: counts the devices of one machine; the plan sets it for each host.
- PET_*: torchrun takes each as one of its own options, whatever the plan says.
- WANDB_SERVICE: the socket of a W&B service on this machine.
- DS_ENV_FILE: where the deepspeed command finds a file on this machine.
- LANG, LC_*: a locale that is not installed on the host costs warnings; ssh has SendEnv for those who want theirs.
- LD_LIBRARY_PATH: other machines have other libraries; ``backend.forward`` takes it where they are alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

DEFAULT_GLOBS = (
    *("NCCL_*", "GLOO_*", "UCX_*", "FI_*"),  # networks
    *("CUDA_*", "PYTORCH_*", "TORCH_*", "TORCHDYNAMO_*", "TORCHINDUCTOR_*", "TRITON_*", "DS_*"),
    *("OMP_*", "MKL_*", "KMP_*", "GOMP_*", "OPENBLAS_*"),
    *("HF_*", "HUGGING_FACE_*", "HUGGINGFACE_*", "TRANSFORMERS_*", "TOKENIZERS_*", "WANDB_*"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)

_NEVER = ("CUDA_VISIBLE_DEVICES", "PET_*", "WANDB_SERVICE", "DS_ENV_FILE", "LAUNCHER_*")
_BUT = ("LAUNCHER_API_KEYS",)
"""What of ``_NEVER`` is the user's after all: the keys that clients of ``job=serve`` show."""


def forwarded(environ: Mapping[str, str], globs: Iterable[str]) -> dict[str, str]:
    """Return the variables that hosts get, secrets among them: they may travel over stdin and stand nowhere else.

    Args:
        environ: of the process that launches.
        globs: as for file names, case-sensitive; ``DEFAULT_GLOBS`` and what the user adds.
    """
    patterns = tuple(globs)
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in _BUT or (_matches(name, patterns) and not _matches(name, _NEVER))
    }


def names(environ: Mapping[str, str], globs: Iterable[str]) -> tuple[str, ...]:
    """Return the names alone, for plans."""
    return tuple(forwarded(environ, globs))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
