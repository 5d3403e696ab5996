"""Where data comes from: local files and folders, data sets of the hub, URLs."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.config.data import files
from launcher.config.data.builtin import BUILTIN_DATA
from launcher.config.data.formats import full_ending, kind_of_ending
from launcher.config.data.hf import SPLITS, data_files, split_of_name
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.utils.hub import HUB_NAME, cached_folder, download
from launcher.utils.text import did_you_mean

SourceKind = Literal["builtin", "local", "hub", "url"]
_TEXT_ENDINGS = (".txt", ".text", ".md", ".rst")
_SHOWN_CONFIGURATIONS = 12
_WANTED = (
    "README.md",
    *(
        f"*{ending}{packed}"
        for ending in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
        for packed in ("", ".gz", ".bz2", ".xz", ".zst")
    ),
)
"""Files of a data set of the hub that are downloaded."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of ``data.path``."""

    name: str
    """As the user typed it."""
    option: str
    """``data.path`` or ``data.eval_path``."""

    @property
    def kind(self) -> SourceKind:
        """What the entry names."""
        if self.name in BUILTIN_DATA:
            return "builtin"
        if "://" in self.name:
            return "url"
        full = Path(self.name).expanduser()
        is_path = self.name.startswith(("/", "./", "../", "~")) or full.exists() or glob.has_magic(self.name)
        names_file = kind_of_ending(full_ending(full)) != "text" or full.suffix.lower() in _TEXT_ENDINGS
        has_parent = "/" in self.name and full.parent.is_dir()
        if is_path or names_file or has_parent or "/" not in self.name or not HUB_NAME.fullmatch(self.name):
            return "local"
        return "hub"

    def local_files(self, *, split: str, configuration: str | None, cache: Path, fetches: bool) -> list[Path] | None:
        """Return the files to read, in their order; ``None`` where they are not on this machine yet.

        Args:
            split: of a folder whose files are named after splits, or of a data set of the hub.
            configuration: of a data set of the hub that has several.
            cache: folder for files of URLs.
            fetches: download what is not here.

        Raises:
            ConfigErrors: there are none.
            EnvironmentProblem: they cannot be downloaded.
        """
        if self.kind == "local":
            folder = Path(self.name).expanduser()
            if folder.is_dir():
                return self._of_folder(folder, split, configuration)
            found, errors = files.expand([self.name], option=self.option)
            if errors:
                raise errors[0]
            return found
        if self.kind == "hub":
            cached = fetch_dataset(self.name, option=self.option) if fetches else cached_dataset(self.name)
            return None if cached is None else self._of_folder(cached, split, configuration)
        if self.kind == "url":
            return fetch_url(self.name, cache, option=self.option) if fetches else None
        return []

    def _of_folder(self, folder: Path, split: str, configuration: str | None) -> list[Path]:
        configurations = _configurations(folder)
        if configuration is not None and not configurations:
            why, fix = f"{self.name} has no configurations", "leave data.name out"
            raise ConfigError("data.name", configuration, why=why, fix=fix)
        chosen = _chosen(configurations, configuration, self)
        if chosen is not None:
            return self._of_configuration(folder, chosen, split)
        found = [file for file in data_files(folder) if _is_data(file)]
        if not found:
            why = "holds no data files" if any(folder.iterdir()) else "is a folder without files"
            fix = "give a folder with text, JSON lines, JSON, CSV, Parquet or Arrow files"
            raise ConfigError(self.option, self.name, why=why, fix=fix)
        splits = {file: split_of_name(str(file.relative_to(folder))) for file in found}
        wanted = SPLITS.get(split, split)
        kept = [file for file in found if splits[file] == wanted]
        if wanted == "train" and not kept:
            kept = [file for file in found if splits[file] is None]
        if not kept:
            names = sorted({name for name in splits.values() if name})
            fix = f"data.split: {did_you_mean(split, names)}" if names else "leave data.split out"
            raise ConfigError("data.split", split, why=f"no file of {self.name} is named after it", fix=fix)
        return kept

    def _of_configuration(self, folder: Path, chosen: Any, split: str) -> list[Path]:
        given = chosen.get("data_files")
        entries = given if isinstance(given, list) else [given]
        by_split: dict[str, list[str]] = {}
        for entry in entries:
            name, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
            by_split.setdefault(str(name), []).extend(paths if isinstance(paths, list) else [str(paths)])
        if split not in by_split:
            why = f"{self.name} has the splits {', '.join(by_split)}"
            raise ConfigError("data.split", split, why=why, fix=f"data.split: {did_you_mean(split, by_split)}")
        base = folder / str(chosen.get("data_dir") or ".")
        found = sorted({file for pattern in by_split[split] for file in base.glob(pattern) if file.is_file()})
        if not found:
            why = f"its README names {', '.join(by_split[split])}, and there are no such files"
            raise ConfigError(self.option, self.name, why=why, fix="download it again, or name the files themselves")
        return found


def _is_data(file: Path) -> bool:
    """Return whether a file of a folder holds rows or text, by its name."""
    if file.name.upper().startswith(("README", "LICENSE")):
        return False
    ending = full_ending(file).lower()
    kind = kind_of_ending(ending)
    return kind not in ("text", "markup") or ending.startswith(_TEXT_ENDINGS)


def _configurations(folder: Path) -> list[dict[str, Any]]:
    """Return the configurations that the README of a data set names in its head."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    if not text.startswith("---\n"):
        return []
    try:
        head = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return []
    found = head.get("configs") if isinstance(head, dict) else None
    return [one for one in found or [] if isinstance(one, dict) and one.get("data_files")]


def _chosen(configurations: Sequence[dict[str, Any]], name: str | None, source: Source) -> dict[str, Any] | None:
    if not configurations:
        return None
    names = [str(one.get("config_name", "default")) for one in configurations]
    if name is not None:
        if name not in names:
            why = f"{source.name} has the configurations {', '.join(names[:_SHOWN_CONFIGURATIONS])}"
            raise ConfigError("data.name", name, why=why, fix=did_you_mean(name, names))
        return configurations[names.index(name)]
    default = next((one for one, named in zip(configurations, names, strict=True) if named == "default"), None)
    default = default or next((one for one in configurations if one.get("default")), None)
    if default is None and len(configurations) > 1:
        why = f"has the configurations {', '.join(names[:_SHOWN_CONFIGURATIONS])}"
        raise ConfigError(source.option, source.name, why=why, fix=f"set data.name={names[0]}")
    return default or configurations[0]


def cached_dataset(name: str) -> Path | None:
    """Return the folder of a data set of the hub if all its files are in the local cache."""
    return cached_folder(name, kind="dataset", whole=_WANTED)


def fetch_dataset(name: str, *, option: str) -> Path:
    """Return the folder of a data set of the hub, after downloading missing files.

    Several processes may call this at once; the hub's own locks let one fetch each file.

    Raises:
        ConfigError: the hub has no such data set, or it needs a login.
        EnvironmentProblem: the hub cannot be reached, or a file failed.
    """
    return download(
        name,
        kind="dataset",
        option=option,
        wanted=_WANTED,
        unwanted=[".*"],
        other_way=f"or `hf download --repo-type dataset {name}` on a machine with network access and copy the cache",
    )


def url_problem(url: str) -> tuple[str, str] | None:
    """Return what is wrong with the URL of a file and what to do, without a connection."""
    import fsspec

    protocol, _, rest = url.partition("://")
    if not rest.strip("/"):
        return "names no file", "write the whole URL of a file"
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        return f"fsspec knows no protocol {protocol}", "give a local file, or an http(s), s3 or gs URL"
    except ImportError as error:
        return f"fsspec lacks the package for {protocol}: {error}", "install it, or give local files"
    return None


def fetch_url(url: str, cache: Path, *, option: str) -> list[Path]:
    """Return local copies of the files that a URL names, downloaded once per version.

    Raises:
        ConfigError: there is no such file.
        EnvironmentProblem: it cannot be downloaded.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        remote = sorted(system.glob(path)) if glob.has_magic(path) else [path]
        copies = [_copy(system, one, cache) for one in remote]
    except FileNotFoundError as error:
        raise ConfigError(option, url, why="there is no such file", fix="check the URL") from error
    except Exception as error:  # each protocol's package raises its own
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise EnvironmentProblem(f"{option}={url} cannot be downloaded ({said})") from error
    if not copies:
        raise ConfigError(option, url, why="matches no file", fix="check the pattern")
    return copies


def _copy(system: Any, remote: str, cache: Path) -> Path:
    key = hashlib.sha256(f"{system.unstrip_protocol(remote)} {system.ukey(remote)}".encode()).hexdigest()[:24]
    target = cache / "remote" / key / remote.rstrip("/").rsplit("/", 1)[-1].partition("?")[0]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        system.get_file(remote, str(part))
        part.replace(target)
    return target


def left_out_of_folder(source: Source, found: Sequence[Path]) -> Iterator[Path]:
    """Yield the data files of a local folder that its split does not hold."""
    folder = Path(source.name).expanduser()
    if source.kind == "local" and folder.is_dir():
        kept = set(found)
        yield from (file for file in data_files(folder) if _is_data(file) and file not in kept)
