"""Where W&B's own client would find a server and a key, without importing it and without handing the key on."""

from __future__ import annotations

import configparser
import netrc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_SERVER = "https://api.wandb.ai"
_SHORTEST_KEY = 40
"""Characters of a key, after an optional prefix and dash; the client refuses shorter ones."""


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Whether W&B can be reached with a key, in words. Never the key itself."""

    server: str
    found: bool
    text: str
    """Where the key is, or why there is none."""


def find_credentials(environ: Mapping[str, str], home: Path) -> Credentials:
    """Look where the client looks, in its order: environment, netrc, its settings file."""
    settings = read_settings(environ, home)
    server = (environ.get("WANDB_BASE_URL") or settings.get("base_url") or DEFAULT_SERVER).rstrip("/")
    host = urlsplit(server).netloc
    netrc_file = _netrc_file(environ, home)
    places = {
        "WANDB_API_KEY": environ.get("WANDB_API_KEY"),
        str(netrc_file): _netrc_key(netrc_file, host),
        "the W&B settings file": settings.get("api_key"),
    }
    if not places["WANDB_API_KEY"] and environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return Credentials(server=server, found=True, text="identity token of WANDB_IDENTITY_TOKEN_FILE")
    for place, key in places.items():
        if key:
            wrong = _what_is_wrong(key)
            text = f"the key in {place} {wrong}" if wrong else f"key from {place}"
            return Credentials(server=server, found=not wrong, text=text)
    return Credentials(server=server, found=False, text=f"no WANDB_API_KEY and no netrc entry for {host}")


def read_settings(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return what ``wandb login`` and ``wandb offline`` keep in the user's settings file."""
    folder = Path(environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(folder / "settings")
    except (configparser.Error, UnicodeDecodeError):
        return {}  # the client, too, takes a broken file for an empty one
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_file(environ: Mapping[str, str], home: Path) -> Path:
    if environ.get("NETRC"):
        return Path(environ["NETRC"]).expanduser()
    usual = home / ".netrc"
    return usual if usual.exists() or not (home / "_netrc").exists() else home / "_netrc"


def _netrc_key(file: Path, host: str) -> str | None:
    try:
        entry = netrc.netrc(file).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None
    return entry[2] if entry else None


def _what_is_wrong(key: str) -> str | None:
    """Return why the client would refuse ``key`` unseen; JSON web tokens (two dots) it takes as they are."""
    if key.count(".") == 2:
        return None
    secret = key.partition("-")[2] or key
    if not re.fullmatch(r"[\w-]+", secret):
        return "holds characters that no W&B key has"
    return None if len(secret) >= _SHORTEST_KEY else f"has {len(secret)} characters, W&B's have {_SHORTEST_KEY} or more"
