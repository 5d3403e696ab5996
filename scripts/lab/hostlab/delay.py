"""Delay what one host sends and receives, in user space: not every kernel has netem.

    delay.py PORT MS SWITCH_PID [leash]

It runs inside the switch's network namespace. It takes the host's port off the bridge, puts another in its place, and
carries frames between the two, each ``MS`` milliseconds later: a round trip takes twice that longer. It prints
"ready" when it does, and puts the port back when it is signalled to end or the switch is gone; on a leash, also when
its stdin ends.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import signal
import socket
import subprocess
import sys
import time

_PACKET_VNET_HDR = 15
"""From linux/if_packet.h: with it, frames whose checksum or segmentation is left to the device pass through whole."""
_SOL_PACKET = 263
_PACKET_OUTGOING = 4
_ALL_PROTOCOLS = 3
_LARGEST_BYTES = 1 << 17
_BUFFER_BYTES = 1 << 22


def main(port: str, delay_s: float, ends: list[int]) -> None:
    """Relay until a signal to end, or until one of the file descriptors ``ends`` is closed."""
    ours, peer = f"{port}a", f"{port}b"
    _ip("link", "delete", ours, check=False)  # of a relay that was killed
    _ip("link", "add", ours, "type", "veth", "peer", "name", peer)
    try:
        for link in (port, ours):
            _ip("link", "set", link, "nomaster", "promisc", "on", "up")
        _ip("link", "set", peer, "master", "br0", "up")
        _relay(_tap(port), _tap(ours), delay_s, ends)
    finally:
        _ip("link", "delete", ours, check=False)
        _ip("link", "set", port, "promisc", "off", "master", "br0", check=False)


def _relay(near: socket.socket, far: socket.socket, delay_s: float, ends: list[int]) -> None:
    selector = selectors.DefaultSelector()
    for source, target in ((near, far), (far, near)):
        selector.register(source, selectors.EVENT_READ, target)
    waker, woken = os.pipe()
    os.set_blocking(woken, False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(woken, b"."))
    for end in (waker, *ends):
        selector.register(end, selectors.EVENT_READ)
    print("ready", flush=True)

    waiting: list[tuple[float, int, socket.socket, bytes]] = []
    count = itertools.count()
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for key, _ in selector.select(timeout):
            if not isinstance(key.fileobj, socket.socket):
                return
            for frame in _frames(key.fileobj):
                heapq.heappush(waiting, (time.monotonic() + delay_s, next(count), key.data, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(waiting)
            try:
                target.send(frame)
            except OSError as error:  # a full buffer or a link that is down: the frame is lost, as on a wire
                print(f"lost {len(frame)} bytes: {error}", file=sys.stderr, flush=True)


def _frames(tap: socket.socket) -> list[bytes]:
    """Return what has arrived, a bounded number so that the other side gets its turn."""
    frames: list[bytes] = []
    for _ in range(64):
        try:
            frame, address = tap.recvfrom(_LARGEST_BYTES)
        except BlockingIOError:
            break
        if address[2] != _PACKET_OUTGOING:  # not what we sent ourselves
            frames.append(frame)
    return frames


def _tap(link: str) -> socket.socket:
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    tap.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    tap.bind((link, 0))
    tap.setblocking(False)
    return tap


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, stderr=None if check else subprocess.DEVNULL)  # noqa: S607


if __name__ == "__main__":
    leash = [0] if "leash" in sys.argv[4:] else []
    main(sys.argv[1], float(sys.argv[2]) / 1000, [os.pidfd_open(int(sys.argv[3])), *leash])
