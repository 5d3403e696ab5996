"""Group tracker: where a run is reported, and which W&B mode and credentials it gets."""

from __future__ import annotations

import configparser
import netrc
import os
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from launcher.config.component import Component
from launcher.errors import ConfigError
from launcher.protocol.plan import TrackerPlan
from launcher.utils.text import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Tracker(Component):
    """A place that a run is reported to."""

    group: ClassVar[str] = "tracker"

    @abstractmethod
    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Decide where metrics go, from what the machine that plans knows.

        Args:
            run_id: minted by the launcher; a resumed run keeps it.
            environ: the environment the tracker will inherit.
            home: the user's home, where credentials are kept.
            run_name: ``run.name``.

        Raises:
            ConfigError: the tracker cannot work with these options.
        """


@dataclass(frozen=True, kw_only=True)
class LocalTracker(Tracker):
    """Nothing besides the run directory."""

    kind: ClassVar[str] = "local"

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Return a plan without a tracker process."""
        return TrackerPlan(kind=self.kind, mode="offline", reason="metrics.jsonl only", run_id=run_id)


_WANDB_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""Values of W&B's WANDB_MODE, and the tracker's mode for each."""

SYNC_HINT = "`wandb sync` uploads it later"


@dataclass(frozen=True, kw_only=True)
class Wandb(Tracker):
    """One W&B run per run, written by a separate process next to rank 0."""

    kind: ClassVar[str] = "wandb"

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """``auto`` is online with a key (WANDB_API_KEY or netrc), else offline.
    The plan shows the mode and its reason."""

    project: str = "launcher"
    """W&B project; a W&B sweep has its own."""

    entity: str | None = None
    """W&B user or team; by default the key's own."""

    group_name: str | None = None
    """W&B group; by default ``run.name``."""

    tags: tuple[str, ...] = ()
    """W&B tags."""

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Return the mode: the configured one, else WANDB_MODE, else online if there is a key.

        In a W&B sweep the run is the one the sweep's agent asked for (WANDB_RUN_ID), in the sweep's project.

        Raises:
            ConfigError: online is wanted without a usable key, or WANDB_MODE is no mode.
        """
        mode, reason = self._mode(environ, home)
        in_sweep = bool(environ.get("WANDB_SWEEP_ID"))
        return TrackerPlan(
            kind=self.kind,
            mode=mode,
            reason=f"{reason}; part of W&B sweep {environ['WANDB_SWEEP_ID']}" if in_sweep else reason,
            run_id=environ.get("WANDB_RUN_ID") or run_id,
            project=(environ.get("WANDB_PROJECT") if in_sweep else None) or self.project,
            group=self.group_name or run_name,
        )

    def _mode(self, environ: Mapping[str, str], home: Path) -> tuple[str, str]:
        wanted, who = self._wanted(environ, home)
        if wanted == "disabled":
            return "disabled", who
        if wanted == "offline":
            return "offline", f"{who}; {SYNC_HINT}"
        credentials = find_wandb_credentials(environ, home)
        if credentials.found:
            return "online", f"{credentials.text}, server {credentials.server}"
        if wanted == "online":
            option, _, value = who.partition("=")
            fix = "run `wandb login`, export WANDB_API_KEY, or set tracker.mode=offline"
            raise ConfigError(option, value, why=f"needs a key: {credentials.text}", fix=fix)
        return "offline", f"{credentials.text}; {SYNC_HINT}"

    def _wanted(self, environ: Mapping[str, str], home: Path) -> tuple[str, str]:
        """Return auto or a mode, and who asked for it."""
        if self.mode != "auto":
            return self.mode, f"tracker.mode={self.mode}"
        given = environ.get("WANDB_MODE")
        if given:
            if given not in _WANDB_MODES:
                raise ConfigError(
                    "WANDB_MODE", given, why="is not a mode of W&B", fix=did_you_mean(given, _WANDB_MODES)
                )
            return _WANDB_MODES[given], f"WANDB_MODE={given}"
        kept = _WANDB_MODES.get(read_wandb_settings(environ, home).get("mode", ""))
        return (kept, "the W&B settings file") if kept in ("offline", "disabled") else ("auto", "tracker.mode=auto")


WANDB_SERVER = "https://api.wandb.ai"
_MIN_KEY_LENGTH = 40
"""Characters of a key, after an optional prefix and dash; the client refuses shorter ones."""


@dataclass(frozen=True, kw_only=True)
class WandbCredentials:
    """Whether there is a W&B key, as text. Never the key itself."""

    server: str
    found: bool
    text: str
    """Where the key was found, or why there is none."""


def find_wandb_credentials(environ: Mapping[str, str], home: Path) -> WandbCredentials:
    """Look where the client looks, in its order: environment, netrc, its settings file."""
    settings = read_wandb_settings(environ, home)
    server = (environ.get("WANDB_BASE_URL") or settings.get("base_url") or WANDB_SERVER).rstrip("/")
    host = urlsplit(server).netloc
    netrc_file = _netrc_file(environ, home)
    places = {
        "WANDB_API_KEY": environ.get("WANDB_API_KEY"),
        str(netrc_file): _netrc_key(netrc_file, host),
        "the W&B settings file": settings.get("api_key"),
    }
    if not places["WANDB_API_KEY"] and environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return WandbCredentials(server=server, found=True, text="identity token of WANDB_IDENTITY_TOKEN_FILE")
    for place, key in places.items():
        if key:
            wrong = _invalid_key(key)
            text = f"the key in {place} {wrong}" if wrong else f"key from {place}"
            return WandbCredentials(server=server, found=not wrong, text=text)
    return WandbCredentials(server=server, found=False, text=f"no WANDB_API_KEY and no netrc entry for {host}")


def read_wandb_settings(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the settings that ``wandb login`` and ``wandb offline`` store for the user."""
    folder = Path(environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(folder / "settings")
    except (configparser.Error, UnicodeDecodeError):
        return {}  # the client, too, takes a broken file for an empty one
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_file(environ: Mapping[str, str], home: Path) -> Path:
    if environ.get("NETRC"):
        return Path(os.path.expanduser(environ["NETRC"]))  # noqa: PTH111 (Path raises for an unknown user)
    usual = home / ".netrc"
    return usual if usual.exists() or not (home / "_netrc").exists() else home / "_netrc"


def _netrc_key(file: Path, host: str) -> str | None:
    try:
        entry = netrc.netrc(file).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None
    return entry[2] if entry else None


def _invalid_key(key: str) -> str | None:
    """Return why the client would reject ``key``; JSON web tokens (two dots) are not checked."""
    if key.count(".") == 2:
        return None
    secret = key.partition("-")[2] or key
    if not re.fullmatch(r"[\w-]+", secret):
        return "contains characters that no W&B key has"
    return (
        None
        if len(secret) >= _MIN_KEY_LENGTH
        else f"has {len(secret)} characters, W&B's have {_MIN_KEY_LENGTH} or more"
    )
