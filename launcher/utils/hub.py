"""The Hugging Face hub: find models in its local cache, and download those that are missing."""

from __future__ import annotations

import functools
import os
import re
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from launcher.errors import ConfigError, EnvironmentProblem

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
"""``org/model`` or, for the oldest, ``model``."""
_CONNECT_S = 3.0
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*")  # other formats' folders, and a second copy of the same weights


def cached_folder(name: str) -> Path | None:
    """Return the folder of a hub model in the local cache, ``None`` when it was never fetched. Stdlib only."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    root = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    repository = root / f"models--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None


def validate_hub_fetch(option: str, value: str, *, name: str, pattern: str, instead: str) -> Iterator[ConfigError]:
    """Yield why a rank on this machine could not fetch a model: it is not in the cache and the hub cannot be reached.

    Args:
        option: the option that asks for it.
        value: of that option.
        name: ``org/model``.
        pattern: of the files that are needed; one in the cache is enough.
        instead: what works without a network.
    """
    folder = cached_folder(name)
    if folder is not None and any(folder.glob(pattern)):
        return
    why = _unreachable()
    if why is not None:
        said = f"{name} is not in the local cache, and {why}"
        fix = f"run `hf download {name}` where there is a network and copy the cache, or {instead}"
        yield ConfigError(option, value, why=said, fix=fix)


@functools.cache
def _unreachable() -> str | None:
    """Return why the hub cannot be asked from this machine, ``None`` if it can, or if only a proxy could say."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{variable} is set"
    from urllib.request import getproxies  # a tenth of a plan's time, and most plans need no hub

    if getproxies():
        return None
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname or "", port), timeout=_CONNECT_S):
            return None
    except (OSError, ValueError) as error:
        return f"{address.hostname} cannot be reached ({getattr(error, 'strerror', None) or error})"


def fetch_model(name: str, *, with_weights: bool, option: str, instead: str) -> Path:
    """Return the local folder of a hub model, after fetching what is missing of config, tokenizer and safetensors.

    Several processes may call this at once; the hub's own locks let one fetch each file.

    Args:
        name: ``org/model``.
        with_weights: fetch safetensors too.
        option: the option that asks for it, for messages.
        instead: what works without a network, for messages.

    Raises:
        ConfigError: the hub has no such model, or it needs a login.
        EnvironmentProblem: the hub cannot be reached and the model is not in the local cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = [*_SMALL, *(["*.safetensors"] if with_weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(_UNWANTED)))
    except (HFValidationError, RepositoryNotFoundError) as error:
        why = "the hub shows no such model, or only to those logged in"
        fix = "check the name, give a local folder, or log in with `hf auth login`"
        raise ConfigError(option, name, why=why, fix=fix) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentProblem(
            f"{name} is not in the local cache and the hub cannot be reached ({type(error).__name__}); run "
            f"`hf download {name}` where there is a network and give {option} that folder, or {instead}"
        ) from error
