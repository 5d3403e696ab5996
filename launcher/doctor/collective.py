"""All-reduces between hosts, as a process of its own on each of them: ``python -m launcher.doctor.collective PARENT``.

The probe starts it early, because importing torch takes seconds, and sends it one line of JSON once all hosts are
known. It prints what it measures, a line each, and the kernel kills it when the probe ends. Every pair has a process
group of its own: when one cannot connect, it is the one that is named, and the others are measured all the same.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

from launcher.doctor.facts import Everyone, Pair
from launcher.doctor.group import Group
from launcher.doctor.pairing import rounds
from launcher.doctor.speech import say
from launcher.supervise.linux import die_with_parent

T = TypeVar("T")

PAIR_S = 5.0
"""Most time for one pair, once both have begun."""

_PLACE = re.compile(r"\[/[^\]]*:\d+\] ")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the probe sends."""

    rank: int
    names: tuple[str, ...]
    """Hosts by rank."""
    address: str
    """Of the first."""
    port: int
    interface: str | None
    uses_gpus: bool
    timeout_s: float


def main() -> None:
    """Serve one order from stdin."""
    die_with_parent(int(sys.argv[1]))
    import torch

    torch.set_num_threads(1)
    line = sys.stdin.readline()
    if line:
        measure(Order(**json.loads(line)))
    sys.stdout.flush()
    os._exit(0)  # groups with a broken connection would wait for it at a regular end


def measure(order: Order) -> None:
    """Measure every pair this host belongs to, then all hosts together, and say each figure."""
    from torch import distributed as dist

    ends = time.monotonic() + order.timeout_s
    if order.interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = order.interface
    timeout = timedelta(seconds=order.timeout_s)
    try:
        store = dist.TCPStore(
            order.address, order.port, None, order.rank == 0, timeout, wait_for_workers=False, use_libuv=True
        )
    except RuntimeError as error:  # DistStoreError and its kin
        say("everyone", everyone=Everyone(problem=f"cannot join the rendezvous: {_first_line(error)}"))
        return
    fine = True
    for pair in (pair for pairs in rounds(len(order.names)) for pair in pairs if order.rank in pair):
        found = _measure_pair(order, pair, store, ends=ends)
        fine = fine and found.problem is None
        if found.problem is not None or order.rank == pair[0]:
            say("pair", pair=found)
    if _is_everyone_fine(store, order, fine=fine):
        say("everyone", everyone=_measure_everyone(order, store, timeout_s=ends - time.monotonic()))


def _measure_pair(order: Order, pair: tuple[int, int], store: Any, *, ends: float) -> Pair:
    from torch import distributed as dist

    hosts = (order.names[pair[0]], order.names[pair[1]])
    prefix = dist.PrefixStore(f"pair/{pair[0]}/{pair[1]}", store)
    place = pair.index(order.rank)

    def figures() -> Pair:
        group = Group(prefix, rank=place, size=2, uses_gpus=order.uses_gpus, timeout_s=PAIR_S)
        latency = group.latency_s()
        return Pair(hosts=hosts, latency_s=latency, bytes_per_s=group.bytes_per_s(latency_s=latency))

    try:
        # the other may still be busy with a pair that fails: not a fault of this one
        prefix.set(f"ready/{place}", "")
        prefix.wait([f"ready/{1 - place}"], timedelta(seconds=max(0.1, ends - time.monotonic())))
        return _within(PAIR_S, figures)
    except (RuntimeError, TimeoutError) as error:
        return Pair(hosts=hosts, problem=_first_line(error))


def _within(timeout_s: float, work: Callable[[], T]) -> T:
    """Return what ``work`` returns. Gloo's own timeout holds for each of its many attempts to connect.

    Raises:
        TimeoutError: it took longer; the thread is left behind, and ends with the process.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except RuntimeError as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return result.result(timeout_s)
    except TimeoutError:
        raise TimeoutError(f"no result within {timeout_s:.0f} s") from None


def _is_everyone_fine(store: Any, order: Order, *, fine: bool) -> bool:
    """Return whether every host could talk to all of its partners; without that, all together would only hang."""
    try:
        store.set(f"fine/{order.rank}", "yes" if fine else "no")
        return all(store.get(f"fine/{rank}") == b"yes" for rank in range(len(order.names)))
    except RuntimeError:  # the first host had its answer and left, with the store
        return False


def _measure_everyone(order: Order, store: Any, *, timeout_s: float) -> Everyone:
    from torch import distributed as dist

    try:
        group = Group(
            dist.PrefixStore("everyone", store),
            rank=order.rank,
            size=len(order.names),
            uses_gpus=order.uses_gpus,
            timeout_s=max(0.1, timeout_s),
        )
        return Everyone(latency_s=group.latency_s())
    except RuntimeError as error:
        return Everyone(problem=_first_line(error))


def _first_line(error: Exception) -> str:
    """Return what torch says, without the place in its sources."""
    return _PLACE.sub("", (str(error).splitlines() or ["no reason given"])[0])[:300]


if __name__ == "__main__":
    main()
