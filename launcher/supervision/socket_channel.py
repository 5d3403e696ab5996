"""Unix socket, in the agent's scratch folder, from rank monitors to their host agent."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.protocol.session_file import ProcessLocation, locate_this_process, process_location_from_tree
from launcher.protocol.wire import MalformedMessage, require_fields
from launcher.utils.files import read_object, write_json
from launcher.utils.schema import to_tree

_SHORT_PARENT = Path("/tmp")  # noqa: S108 (mkdtemp makes a private folder in it)


_PREFIX, _OWNER = "launcher-", "owner.json"


_SEND_S = 2.0


MONITOR_FIELDS: dict[str, dict[str, type]] = {
    "hello": {"rank": int, "guard": int, "pid": int},
    "told": {"signal": int, "told_at": float},
    "exit": {"status": int, "time": float, "wall_s": float, "by_launcher": bool},
}
"""What a guard sends, by ``kind``."""


_MAX_MESSAGE_BYTES = 4096


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a private folder for the socket; in /tmp when the usual place is too deep for a socket's name.

    Folders of process trees that were killed as a whole are removed: nothing of those was left to do it.
    """
    usual = Path(tempfile.gettempdir())
    parent = usual if len(str(usual)) < 60 else _SHORT_PARENT
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    write_json(folder / _OWNER, to_tree(locate_this_process()))
    for left in parent.glob(f"{_PREFIX}*"):
        if (owner := _owner_of(left)) is not None and owner.is_running() is False:
            remove_scratch(left)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_scratch(folder: Path) -> None:
    """Remove the folder of an agent that could not do so itself; any other folder is left alone."""
    if _owner_of(folder) is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _owner_of(folder: Path) -> ProcessLocation | None:
    """Return the process that made a scratch folder of this user; ``None`` where it is no such folder."""
    try:
        found = folder.lstat()
        if not (folder.name.startswith(_PREFIX) and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()):
            return None
        return process_location_from_tree(read_object(folder / _OWNER))
    except (OSError, ValueError):  # gone, or made by another program
        return None


def is_scratch_folder(path: str) -> bool:
    """Return whether ``path`` can only be what ``scratch_folder`` makes, and so may be removed after its owner."""
    folder = Path(path)
    return folder.parent in (Path(tempfile.gettempdir()), _SHORT_PARENT) and folder.name.startswith(_PREFIX)


def socket_in(scratch: Path) -> Path:
    """Return where the agent listens."""
    return scratch / "agent"


def listen_for_monitors(scratch: Path) -> socket.socket:
    """Open the agent's side: a socket that keeps messages apart and tells when a peer is gone."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(socket_in(scratch)))
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def receive_from_monitor(peer: socket.socket) -> dict[str, Any] | None:
    """Return the next message of a guard; ``None`` once it is gone.

    Raises:
        BlockingIOError: there is nothing yet.
        MalformedMessage: it sent what is no message.
    """
    try:
        data = peer.recv(_MAX_MESSAGE_BYTES)
    except ConnectionResetError:
        return None
    if not data:
        return None
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage("a message that is not JSON") from error
    kind = message.get("kind") if isinstance(message, dict) else None
    fields = MONITOR_FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise MalformedMessage("a message of no known kind")
    require_fields(message, fields)
    return dict(message)


class SocketChannel:
    """The guard's side. A rank started by hand, or after its agent died, has nobody to tell."""

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = scratch
        self._socket: socket.socket | None = None
        self._is_lost = False
        if scratch is None:
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.connect(str(socket_in(scratch)))
        except OSError:  # the agent was killed while this rank was starting
            self._is_lost = True
            self.close()

    def tell(self, **message: Any) -> None:
        """Send one message, unless the agent is gone."""
        if self._socket is None:
            return
        try:
            self._socket.settimeout(_SEND_S)
            self._socket.send(json.dumps(message).encode())
        except OSError:
            self._is_lost = True
            self.close()

    def orders(self) -> tuple[int, ...]:
        """Return nothing: this agent signals guards by itself."""
        return ()

    def lost(self) -> bool:
        """Return whether there was an agent and it is gone."""
        if self._socket is None:
            return self._is_lost
        try:
            self._socket.setblocking(False)
            return self._socket.recv(1) == b""  # the agent never says anything
        except BlockingIOError:
            return False
        except OSError:
            return True

    def clean_up_after_agent(self) -> None:
        """Remove the folder of an agent that is gone, because it could not do so itself."""
        if self._scratch is not None:
            remove_scratch(self._scratch)

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
