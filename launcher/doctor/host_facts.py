"""Facts that a host finds about itself: hardware, software, disks, addresses and routes.

Versions are read from metadata: importing torch takes seconds. The run directory is not created: its nearest existing
parent is checked. No packet is sent to find a route.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import os
import platform
import re
import secrets
import socket
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path

import psutil

import launcher
from launcher.doctor.protocol import PACKAGES, Contact, HostFacts, PluginFacts, Software, Storage
from launcher.errors import ConfigError
from launcher.utils.hardware import cpu_computes_bf16, list_gpus, memory_limit, visible_gpus

_CUDA = re.compile(r"^cuda\b[^=]*=\s*['\"]([0-9.]+)['\"]", re.MULTILINE)
_DRIVER = re.compile(r"Kernel Module(?: for \S+)?\s+([0-9.]+)")
_SHM = Path("/dev/shm")  # noqa: S108 (only its size is asked)

_NETWORK_FILE_SYSTEMS = re.compile(
    r"(fuse\.)?(nfs4?|lustre|gpfs|beegfs|beegfs_nodev|ceph|cifs|smb3|glusterfs|afs|pvfs2|wekafs)"
)
"""Types of file systems whose source is the same name on every host."""

_DOCUMENTATION_ADDRESS = "203.0.113.1"  # reserved for documentation (RFC 5737), so it takes the default route
_RTT_AT = 68
_BACKLOG = 4096
"""Number of hosts whose connections the kernel accepts without ``accept``."""


def collect_host_facts(
    run_dir: Path, *, token: str | None, environ: Mapping[str, str], plugins: Sequence[str] = ()
) -> HostFacts:
    """Return the facts of this machine.

    Args:
        run_dir: of the run.
        token: path of a file that the launching machine wrote.
        environ: of this process, with the variables of ssh and CUDA.
        plugins: modules that the run needs.
    """
    gpus = visible_gpus(list_gpus(), environ.get("CUDA_VISIBLE_DEVICES"))
    memory = memory_limit()
    return HostFacts(
        hostname=socket.gethostname(),
        address=own_address(environ.get("SSH_CONNECTION")),
        architecture=platform.machine(),
        boot_id=_boot_id(),
        cores=_cores(environ),
        memory_bytes=memory,
        free_memory_bytes=min(memory, psutil.virtual_memory().available),
        computes_bf16=cpu_computes_bf16(),
        devices=tuple(gpu.name for _, gpu in gpus),
        device_ids=tuple(word for word, _ in gpus),
        device_bytes=min((gpu.memory_bytes for _, gpu in gpus), default=0),
        software=collect_software(plugins),
        storage=examine_storage(run_dir, token=token),
    )


def _cores(environ: Mapping[str, str]) -> int:
    """Return the number of cores that this process may use.

    Clusters that bind no processes say only in a variable how many Slurm has allocated.
    """
    allocated = environ.get("SLURM_CPUS_ON_NODE", "")
    cores = len(os.sched_getaffinity(0))
    return min(cores, int(allocated)) if allocated.isdigit() and int(allocated) else cores


def _boot_id(file: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    return file.read_text(encoding="ascii").strip() if file.is_file() else ""


def collect_software(plugins: Sequence[str] = ()) -> Software:
    """Return the software of this interpreter; ``plugins`` are modules to load."""
    found = {name: _version(name) for name in PACKAGES}
    return Software(
        python=platform.python_version(),
        python_path=sys.executable,
        packages={name: number for name, number in found.items() if number is not None},
        cuda=_cuda(),
        nccl=_nccl(),
        driver=_driver(),
        code_hash=code_hash(),
        plugins=tuple(collect_plugin(module) for module in plugins),
    )


def collect_plugin(module: str) -> PluginFacts:
    """Return the facts of a plugin, which is loaded as ranks load it."""
    from launcher.config.plugins import load_plugins  # the schema: only where a run uses plugins
    from launcher.plugins.loading import plugins_of

    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for messages
            load_plugins([module], with_installed=False)
    except ConfigError as error:
        return PluginFacts(module=module, problem=error.why)
    (loaded,) = plugins_of([module])
    return PluginFacts(module=module, file=str(loaded.file), version=loaded.version, code_hash=loaded.code_hash)


def code_hash() -> str:
    """Return the SHA-256 over the names and contents of this package's modules."""
    package = Path(launcher.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py"), key=lambda file: file.relative_to(package).parts):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cuda() -> str | None:
    """Return the CUDA version in ``torch/version.py``, without importing torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    found = _CUDA.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else None


def _nccl() -> str | None:
    """Return the version of the NCCL package; its name ends with a CUDA version."""
    for distribution in distributions():
        if (distribution.name or "").lower().replace("_", "-").startswith("nvidia-nccl-"):
            return distribution.version
    return None


def _driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    found = _DRIVER.search(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    return found[1] if found else None


@dataclass(frozen=True, kw_only=True)
class DiskToken:
    """A file of the launching machine whose existence hosts check."""

    folder: str
    """Folder of the file."""
    path: str | None
    """``None`` when it could not be written."""
    problem: str | None = None


@contextmanager
def create_disk_token(run_dir: Path) -> Iterator[DiskToken]:
    """Create a file with a random name next to the run directory; remove it after the block."""
    folder = nearest_existing(run_dir)
    file = folder / f".launcher-doctor-{secrets.token_hex(8)}"
    try:
        file.touch(mode=0o600, exist_ok=False)
    except OSError as error:
        yield DiskToken(folder=str(folder), path=None, problem=error.strerror or str(error))
        return
    try:
        yield DiskToken(folder=str(folder), path=str(file))
    finally:
        file.unlink(missing_ok=True)


def examine_storage(run_dir: Path, *, token: str | None) -> Storage:
    """Return the storage of the run directory on this machine.

    Args:
        run_dir: absolute.
        token: path of the file that the launching machine wrote, if it could.
    """
    folder = nearest_existing(run_dir)
    disk = os.statvfs(folder)
    shm = os.statvfs(_SHM) if _SHM.is_dir() else None
    return Storage(
        folder=str(folder),
        problem=_write_problem(folder),
        is_shared=token is not None and Path(token).exists(),
        served_by=served_folder(folder),
        free_bytes=disk.f_bavail * disk.f_frsize,
        shm_bytes=shm.f_blocks * shm.f_frsize if shm else 0,
        shm_free_bytes=shm.f_bavail * shm.f_frsize if shm else 0,
    )


def nearest_existing(folder: Path) -> Path:
    """Return ``folder``, or its nearest parent that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def _write_problem(folder: Path) -> str | None:
    """Return why no file can be created; permissions alone do not tell on network disks."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # unnamed where the file system supports it
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def served_folder(folder: Path, *, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return file server and path of a folder; empty for a local disk or an unknown type."""
    folder = folder.resolve()
    found = ""
    longest = -1
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        root, point = (Path(_unescape(word)) for word in before.split()[3:5])
        kind, source = after.split()[:2]
        if len(point.parts) >= longest and folder.is_relative_to(
            point
        ):  # of two mounts at one point, the later covers the first
            longest = len(point.parts)
            path = root / folder.relative_to(point)
            found = f"{kind} {_unescape(source)} {path}" if _NETWORK_FILE_SYSTEMS.fullmatch(kind) else ""
    return found


def _unescape(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), word)


def own_address(ssh_connection: str | None) -> str:
    """Return the address that others reach this machine at.

    Args:
        ssh_connection: ``client port server port``, as sshd sets it; its server address works. A batch job may have
            inherited that of another machine.
    """
    words = (ssh_connection or "").split()
    if len(words) == 4 and words[2] in _interfaces() and not _is_loopback(words[2]):
        return words[2]
    routed = local_address_towards(_DOCUMENTATION_ADDRESS)
    if routed is not None and not _is_loopback(routed):
        return routed
    found = [address for address in _interfaces() if not _is_loopback(address) and not _is_link_local(address)]
    return found[0] if found else "127.0.0.1"


def local_address_towards(address: str) -> str | None:
    """Return the address of this machine on the route to another; ``None`` without a route."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as route:
            route.connect(target)  # a datagram socket only chooses the route
            chosen: str = route.getsockname()[0]
            return chosen
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has ``address``."""
    return _interfaces().get(address)


def open_rendezvous_port(port: int | None) -> socket.socket:
    """Open the rendezvous port on all addresses, as torchrun will.

    Raises:
        OSError: it is in use, or not allowed.
    """
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(_NoIpv6):
            return _listen(port, socket.AF_INET6)
    return _listen(port, socket.AF_INET)


def port_owner(port: int) -> str | None:
    """Return the process that listens on a port of this machine, if this login may know."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            is_listening = connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,)
            if is_listening and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return None


def _listen(port: int | None, family: socket.AddressFamily) -> socket.socket:
    both = family == socket.AF_INET6
    try:
        return socket.create_server(("", port or 0), family=family, dualstack_ipv6=both, backlog=_BACKLOG)
    except OSError as error:
        if both and error.errno == errno.EADDRNOTAVAIL:  # the kernel has IPv6, but it is disabled
            raise _NoIpv6 from error
        raise


class _NoIpv6(Exception):
    """This machine has no IPv6."""


def find_route(address: str) -> Contact:
    """Return the route from this machine to another, without connecting."""
    local = local_address_towards(address)
    interface = interface_of(local) if local is not None else None
    problem = f"no route to {address}" if local is None else None
    return Contact(interface=interface, local_address=local, latency_s=None, problem=problem)


def measure_contact(address: str, port: int, *, timeout_s: float) -> Contact:
    """Return the route to another machine's listening port and the time of a round trip."""
    latency, problem = None, None
    try:
        _handshake_s(address, port, timeout_s=timeout_s)  # the first one includes the ARP request
        latency = _handshake_s(address, port, timeout_s=timeout_s)
    except TimeoutError:
        problem = f"no answer within {timeout_s:.0f} s"
    except OSError as error:
        problem = "connection refused" if error.errno == errno.ECONNREFUSED else error.strerror or str(error)
    return replace(find_route(address), latency_s=latency, problem=problem)


def _handshake_s(address: str, port: int, *, timeout_s: float) -> float | None:
    """Return the kernel's own measurement of a handshake, which does not depend on the load.

    The offset is that of ``tcpi_rtt``, in microseconds, in ``struct tcp_info`` of linux/tcp.h.
    """
    with socket.create_connection((address, port), timeout=timeout_s) as peer:
        if sys.platform != "linux":
            return None
        info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_AT + 4)
        microseconds: int = struct.unpack_from("I", info, _RTT_AT)[0]
        return microseconds / 1e6


def _interfaces() -> dict[str, str]:
    """Return the interface of each address of this machine."""
    return {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _is_link_local(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_link_local
