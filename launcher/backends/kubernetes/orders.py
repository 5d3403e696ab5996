"""What every pod finds in a folder when it starts: the snapshot, its orders, and a key that proves it belongs here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigError, ConfigErrors, EnvironmentProblem
from launcher.files import read_json
from launcher.plan import Identity
from launcher.schema import build, to_tree

FOLDER = "/run/launcher"
"""Where the folder is mounted."""

SNAPSHOT = "run.yaml"
ORDERS = "orders.json"
KEY = "key"
"""Name of the file, and of the entry in the Secret."""


@dataclass(frozen=True, kw_only=True)
class PodOrders:
    """All that the pods cannot find in the snapshot. From both they make the plan themselves, so it need not travel."""

    job: str
    """Name of the run in the cluster; addresses follow from it."""
    identity: Identity

    @property
    def session_port(self) -> int:
        """Where the first pod waits for the others: beside the port of the rendezvous."""
        port = self.identity.port
        return port + 1 if port < 65535 else port - 1

    def dump(self) -> str:
        """Return the text of ``orders.json``."""
        return json.dumps(to_tree(self), separators=(",", ":"))


def load_orders(folder: Path) -> PodOrders:
    """Return the orders in ``folder``.

    Raises:
        EnvironmentProblem: there are none.
        ConfigErrors: they were not written by this version.
    """
    path = folder / ORDERS
    if not path.is_file():
        raise EnvironmentProblem(f"{path} does not exist: this is the entry of a pod that `backend=kubernetes` makes")
    mistakes: list[ConfigError] = []
    orders = build(PodOrders, read_json(path), path="orders", report=mistakes.append)
    if orders is None:
        raise ConfigErrors(mistakes)
    return orders


def load_key(folder: Path) -> bytes:
    """Return the key of the run."""
    return (folder / KEY).read_bytes()
