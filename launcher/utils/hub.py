"""The Hugging Face hub: find models in its local cache, and download those that are missing."""

from __future__ import annotations

import functools
import os
import re
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from launcher.errors import ConfigError, EnvironmentProblem
from launcher.utils.files import exists, home_folder
from launcher.utils.text import shell_word

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
"""``org/model`` or, for the oldest, ``model``."""
_RUN_ID = re.compile(r"\d{8}-\d{6}-[a-z]{4}(@.+)?", re.ASCII)
_CONNECT_S = 3.0
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*")  # other formats' folders, and a second copy of the same weights


def cached_folder(name: str, *, kind: Literal["model", "dataset"] = "model") -> Path | None:
    """Return the folder of a hub model or data set in the local cache, or ``None``.

    Standard library only.
    """
    root = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or _home() / "hub"))  # noqa: PTH111
    repository = root / f"{kind}s--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None


def _home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(cache, "huggingface"))


def validate_hub_fetch(option: str, value: str, *, name: str, pattern: str, instead: str) -> Iterator[ConfigError]:
    """Yield why a rank on this machine could not download a model that is not cached.

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
        fix = f"run `hf download {name}` on a machine with network access and copy the cache, or {instead}"
        yield ConfigError(option, value, why=said, fix=fix)


def validate_hub_name(
    option: str, value: str, *, holds: str, is_such: Callable[[Path], bool], instead: str, takes_names: bool = True
) -> ConfigError | None:
    """Return why a value that is not a local folder cannot be a hub name; ``None`` if it can.

    Args:
        option: the option that takes a folder or a name.
        value: of that option.
        holds: what the folder must hold, for messages.
        is_such: whether a folder holds that.
        instead: what to do otherwise.
        takes_names: whether the option takes names on the hub at all.
    """
    path, fix = Path(value).expanduser(), f"give a folder that holds {holds}, or {instead}"
    if exists(path):
        if is_such(path.parent):
            folder = path.parent if path.is_absolute() else f"./{path.parent}" if path.parent.parts else "."
            fix = f"set {option}={shell_word(str(folder))}"
        return ConfigError(option, value, why="is a file, not a folder", fix=fix)
    is_path = value.startswith(("/", "./", "../", "~")) or not takes_names
    if _RUN_ID.fullmatch(value):
        why, fix = "is the id of a run, not a name on the hub (org/model)", f"set model.weights={value}"
        return ConfigError(option, value, why=why, fix=f"{fix}, and leave {option} out")
    if not is_path and HUB_NAME.fullmatch(value):
        return None
    why = "there is no such folder" if is_path else "is neither a folder nor a name on the hub (org/model)"
    seen_from = "" if path.is_absolute() else f" (relative to {Path.cwd()})"
    return ConfigError(option, value, why=why + seen_from, fix=fix)


def validate_dataset_fetch(option: str, name: str) -> Iterator[ConfigError]:
    """Yield why a rank on this machine could not load a data set that is not cached.

    Args:
        option: the option that asks for it.
        name: ``org/data``.
    """
    if _has_cached_dataset(name):
        return
    why = _unreachable("HF_DATASETS_OFFLINE")
    if why is not None:
        said = f"{name} is not in the local cache, and {why}"
        fetch = f"hf download --repo-type dataset {name} --local-dir FOLDER"
        yield ConfigError(
            option, name, why=said, fix=f"run `{fetch}` on a machine with network access and set {option}=./FOLDER"
        )


def _has_cached_dataset(name: str) -> bool:
    """Return whether ``datasets`` has prepared a hub data set, which then needs no network."""
    root = Path(os.environ.get("HF_DATASETS_CACHE") or _home() / "datasets").expanduser()
    *namespace, last = name.split("/")
    snake = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", last)).lower()
    try:
        return any(path.is_dir() for path in (root / "___".join([*namespace, snake])).glob("*/*/*"))
    except OSError:
        return False


@functools.cache
def _unreachable(*more: str) -> str | None:
    """Return why the hub cannot be reached from here.

    ``None`` if it can, or if there is a proxy.

    Args:
        more: variables, besides those of models, that forbid it.
    """
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", *more):
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
    """Return the local folder of a hub model, after downloading its missing files.

    These are config, tokenizer and safetensors.

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
        HFValidationError,
        RepositoryNotFoundError,
    )

    wanted = [*_SMALL, *(["*.safetensors"] if with_weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(_UNWANTED)))
    except (HFValidationError, RepositoryNotFoundError) as error:
        why = "the hub has no such public model"
        fix = "check the name, give a local folder, or log in with `hf auth login`"
        raise ConfigError(option, name, why=why, fix=fix) from error
    except Exception as error:  # a broken transfer raises what its HTTP library raises
        raise EnvironmentProblem(
            f"{name} is not in the local cache and the hub cannot be reached ({type(error).__name__}); run "
            f"`hf download {name}` on a machine with network access and give {option} that folder, or {instead}"
        ) from error
