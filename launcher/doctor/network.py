"""Addresses, routes and TCP between hosts, asked of the kernel: no packet is sent to find a route."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
import sys
from dataclasses import replace

import psutil

from launcher.doctor.facts import Contact

_SOMEWHERE = "203.0.113.1"  # kept for documentation (RFC 5737): nobody's, so it takes the default route
_RTT_AT = 68
_BACKLOG = 4096
"""Hosts whose connections the kernel accepts by itself."""


def own_address(ssh_connection: str | None) -> str:
    """Return the address that others reach this machine at.

    Args:
        ssh_connection: ``client port server port`` as sshd leaves it, whose server address is known to work. A batch
            job may have inherited another machine's.
    """
    words = (ssh_connection or "").split()
    if len(words) == 4 and words[2] in _interfaces() and not _is_loopback(words[2]):
        return words[2]
    routed = local_address_towards(_SOMEWHERE)
    if routed is not None and not _is_loopback(routed):
        return routed
    found = [address for address in _interfaces() if not _is_loopback(address) and not _is_link_local(address)]
    return found[0] if found else "127.0.0.1"


def local_address_towards(address: str) -> str | None:
    """Return the address of this machine on the route to another; ``None`` without a route."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as route:
            route.connect(target)  # of a datagram socket: chooses the route, sends nothing
            chosen: str = route.getsockname()[0]
            return chosen
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has ``address``."""
    return _interfaces().get(address)


def listen(port: int | None) -> socket.socket:
    """Open the rendezvous port on all addresses, as torchrun will.

    Raises:
        OSError: it is taken, or not allowed.
    """
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(_NoIpv6):
            return _listen(port, socket.AF_INET6)
    return _listen(port, socket.AF_INET)


def owner_of(port: int) -> str | None:
    """Return who listens on a port of this machine, as far as this login may know."""
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
        if both and error.errno == errno.EADDRNOTAVAIL:  # the kernel has IPv6, and it is switched off
            raise _NoIpv6 from error
        raise


class _NoIpv6(Exception):
    """Only IPv4 here."""


def route(address: str) -> Contact:
    """Return how this machine would reach another, without trying."""
    local = local_address_towards(address)
    interface = interface_of(local) if local is not None else None
    problem = f"no route to {address}" if local is None else None
    return Contact(interface=interface, local_address=local, latency_s=None, problem=problem)


def contact(address: str, port: int, *, timeout_s: float) -> Contact:
    """Return how this machine reaches another's port, with the time of a round trip; nobody need accept there."""
    latency, problem = None, None
    try:
        _handshake_s(address, port, timeout_s=timeout_s)  # the first one asks for the hardware address, too
        latency = _handshake_s(address, port, timeout_s=timeout_s)
    except TimeoutError:
        problem = f"no answer within {timeout_s:.0f} s"
    except OSError as error:
        problem = "connection refused" if error.errno == errno.ECONNREFUSED else error.strerror or str(error)
    return replace(route(address), latency_s=latency, problem=problem)


def _handshake_s(address: str, port: int, *, timeout_s: float) -> float | None:
    """Return the kernel's own measurement of a handshake, which no busy processor or program can stretch.

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
