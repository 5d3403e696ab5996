"""Unix socket, in the agent's scratch folder, from rank monitors to their host agent."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from launcher.protocol.session_file import ProcessLocation, locate_this_process
from launcher.protocol.wire import decode
from launcher.utils.files import read_regular, write_json
from launcher.utils.schema import to_tree

_SHORT_PARENT = Path("/tmp")  # noqa: S108 (mkdtemp makes a private folder in it)
_PREFIX, _OWNER = "launcher-", "owner.json"
_SEND_S = 2.0

_MAX_MESSAGE_BYTES = 4096


class MonitorStarted(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="started"):
    """From a rank monitor: its rank has started."""

    rank: int
    monitor_pid: int
    pid: int


class MonitorSignalled(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="signalled"):
    """From a rank monitor: the launcher of its rank sent it a signal."""

    signal: int
    signalled_at: float


class MonitorExited(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="exited"):
    """From a rank monitor: its rank has exited."""

    status: int
    """Wait status."""
    time: float
    wall_s: float
    by_launcher: bool
    """Whether the launcher of the rank sent it the signal that ended it."""


MonitorMessage = MonitorStarted | MonitorSignalled | MonitorExited


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Create a private folder for the socket; in /tmp when TMPDIR is too long for a socket.

    Folders of dead agents, whose whole process tree was killed, are removed.
    """
    default = Path(tempfile.gettempdir())
    parent = default if len(str(default)) < 60 else _SHORT_PARENT
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
    """Remove the folder of an agent that was killed; do nothing to any other folder."""
    if _owner_of(folder) is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _owner_of(folder: Path) -> ProcessLocation | None:
    """Return the creator of a scratch folder of this user; ``None`` for any other folder."""
    try:
        found = folder.lstat()
        if not (folder.name.startswith(_PREFIX) and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()):
            return None
        owner: ProcessLocation = decode(read_regular(folder / _OWNER), ProcessLocation)
    except (OSError, ValueError):  # gone, or created by another program
        return None
    return owner


def is_scratch_folder(path: str) -> bool:
    """Return whether ``path`` has the form of a folder that ``scratch_folder`` creates."""
    folder = Path(path)
    return folder.parent in (Path(tempfile.gettempdir()), _SHORT_PARENT) and folder.name.startswith(_PREFIX)


def socket_in(scratch: Path) -> Path:
    """Return the path of the agent's socket."""
    return scratch / "agent"


def listen_for_monitors(scratch: Path) -> socket.socket:
    """Open the agent's side: a socket that keeps message boundaries and detects closed peers."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(socket_in(scratch)))
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def receive_from_monitor(peer: socket.socket) -> MonitorMessage | None:
    """Return the next message of a rank monitor; ``None`` once it is gone.

    Raises:
        BlockingIOError: no message has arrived yet.
        MalformedMessage: it sent invalid data.
    """
    try:
        data = peer.recv(_MAX_MESSAGE_BYTES)
    except ConnectionResetError:
        return None
    if not data:
        return None
    message: MonitorMessage = decode(data, MonitorMessage)
    return message


class SocketChannel:
    """The rank monitor's side; not connected for a rank started by hand or after its agent died."""

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = scratch
        self._socket: socket.socket | None = None
        self._was_closed = False
        if scratch is None:
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.connect(str(socket_in(scratch)))
        except OSError:  # the agent was killed while this rank was starting
            self._was_closed = True
            self.close()

    def send(self, message: MonitorMessage) -> None:
        """Send one message, unless the agent is gone."""
        if self._socket is None:
            return
        try:
            self._socket.settimeout(_SEND_S)
            self._socket.send(msgspec.json.encode(message))
        except OSError:
            self._was_closed = True
            self.close()

    def signals(self) -> tuple[int, ...]:
        """Return no signals: an agent on the same host signals the monitors itself."""
        return ()

    def is_closed(self) -> bool:
        """Return whether there was an agent and it is gone."""
        if self._socket is None:
            return self._was_closed
        try:
            self._socket.setblocking(False)
            return self._socket.recv(1) == b""  # the agent sends nothing
        except BlockingIOError:
            return False
        except OSError:
            return True

    def clean_up_after_agent(self) -> None:
        """Remove the scratch folder of an agent that was killed."""
        if self._scratch is not None:
            remove_scratch(self._scratch)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
