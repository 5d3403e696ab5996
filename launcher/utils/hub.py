"""The Hugging Face hub: find models in its local cache, and download those that are missing."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.errors import ConfigError, EnvironmentProblem, LauncherError
from launcher.utils.files import exists, home_folder
from launcher.utils.text import shell_word

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
"""``org/model`` or, for the oldest, ``model``."""
_RUN_ID = re.compile(r"\d{8}-\d{6}-[a-z]{4}(@.+)?", re.ASCII)
_CONNECT_S = 3.0
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*")  # other formats' folders, and a second copy of the same weights


def cached_folder(name: str, *, kind: Literal["model", "dataset"] = "model", whole: Sequence[str] = ()) -> Path | None:
    """Return the folder of a hub model or data set in the local cache, or ``None``.

    Standard library only.

    Args:
        name: ``org/name``.
        kind: of the repository.
        whole: patterns of files; a folder that lacks one of them, because its download broke off, counts as missing.
    """
    root = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or _home() / "hub"))  # noqa: PTH111
    repository = root / f"{kind}s--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = repository / "snapshots" / commit
    if not folder.is_dir():
        return None
    wanted = (file for file in _listed(repository / "trees" / f"{commit}.json") for one in whole if fnmatch(file, one))
    return folder if all(exists(folder / file) for file in wanted) else None


def _listed(tree: Path) -> list[str]:
    """Return the files that the hub listed before a download.

    The list is empty where huggingface_hub did not keep it.
    """
    try:
        names = json.loads(tree.read_text(encoding="utf-8"))["files"]
        return [str(name) for name in names if not str(name).startswith(".")]
    except (OSError, ValueError, LookupError, TypeError):
        return []


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
    address = urllib.parse.urlsplit(_endpoint())
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
        ConfigError: the hub has no such model, it needs a login, or it has no weights in safetensors.
        EnvironmentProblem: the hub cannot be reached and the model is not in the local cache.
    """
    wanted = [*_SMALL, *(["*.safetensors"] if with_weights else [])]
    other_way = f"or `hf download {name}` on a machine with network access and give {option} that folder, or {instead}"
    folder = download(name, kind="model", option=option, wanted=wanted, unwanted=_UNWANTED, other_way=other_way)
    if with_weights and not any(folder.glob("*.safetensors")):
        why = f"holds no weights in safetensors ({folder})"
        fix = "name one that does, or load it with Transformers and give a folder that save_pretrained wrote"
        raise ConfigError(option, name, why=why, fix=fix)
    return folder


def download(
    name: str,
    *,
    kind: Literal["model", "dataset"],
    option: str,
    wanted: Sequence[str],
    unwanted: Sequence[str],
    other_way: str,
) -> Path:
    """Return the local folder of a repository of the hub, after downloading its missing files.

    A connection that breaks is continued, and files that are complete are not fetched again.

    Args:
        name: ``org/name``.
        kind: of the repository.
        option: the option that names it.
        wanted: patterns of its files.
        unwanted: patterns of files to leave out.
        other_way: how to get it when the hub cannot be reached, for messages.

    Raises:
        ConfigError: the hub has no such repository, or does not give it to this user.
        EnvironmentProblem: the hub cannot be reached, or a file failed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(name, repo_type=kind, allow_patterns=list(wanted), ignore_patterns=list(unwanted))
        )
    except HFValidationError as error:
        raise _no_such(name, kind, option) from error
    except HfHubHTTPError as error:
        raise _refused(error, name, kind, option, other_way) from error
    except Exception as error:  # a broken transfer raises what its HTTP library raises
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):  # the list of files failed, and there is no copy here
            raise _refused(cause, name, kind, option, other_way) from error
        raise _broken(error, name, option, other_way) from error


def _refused(
    error: HfHubHTTPError, name: str, kind: Literal["model", "dataset"], option: str, other_way: str
) -> LauncherError:
    """Return the error of a response with which the hub refuses a download."""
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError

    status = error.response.status_code
    page = f"{_endpoint()}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if isinstance(error, GatedRepoError):  # also a RepositoryNotFoundError
        why = "is gated: the hub gives it to accounts that have accepted its terms"
        fix = f"accept them at {page}, and log in with `hf auth login` or export HF_TOKEN"
        if status == HTTPStatus.FORBIDDEN:
            fix = f"ask for access at {page} with the account of your token, and wait until it is granted"
        return ConfigError(option, name, why=why, fix=fix)
    if isinstance(error, RepositoryNotFoundError):
        return _no_such(name, kind, option)
    if status == HTTPStatus.UNAUTHORIZED:
        why = "the hub rejects your token: it has expired, or is mistyped"
        return ConfigError(option, name, why=why, fix="log in again with `hf auth login`, or correct HF_TOKEN")
    if isinstance(error, DisabledRepoError) or status == HTTPStatus.FORBIDDEN:
        why = "the hub forbids the download"
        fix = f"see {page}; a token needs the permission to read it"
        return ConfigError(option, name, why=why, fix=fix)
    return _broken(error, name, option, other_way)


def _no_such(name: str, kind: Literal["model", "dataset"], option: str) -> ConfigError:
    if kind == "dataset":
        why = "is no path on this machine, and the hub has no such public data set"
        fix = "check the name, give local files, or log in with `hf auth login`"
    else:
        why = "the hub has no such public model"
        fix = "check the name, give a local folder, or log in with `hf auth login`"
    return ConfigError(option, name, why=why, fix=fix)


def _broken(error: Exception, name: str, option: str, other_way: str) -> EnvironmentProblem:
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    said = ": ".join(lines[:2]) or type(error).__name__
    return EnvironmentProblem(
        f"{option}={name} cannot be downloaded ({said}); run the same command again to continue, {other_way}"
    )


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
