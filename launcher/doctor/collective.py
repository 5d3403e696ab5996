"""Entry of all-reduces between hosts: ``python -m launcher.doctor.collective PARENT``.

The probe starts it early, because importing torch takes seconds, and sends it one line of JSON once all hosts are
known. It prints one line per measurement, and the kernel kills it when the probe exits. Every pair has a process group
of its own: one that cannot connect is named, and the others are still measured. The pairs of a round share no host, so
a round runs concurrently.
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

from launcher.doctor.protocol import GroupMeasurement, PairMeasurement, send_message
from launcher.utils.processes import die_with_parent

_SMALL, _MIDDLE, _LARGE = 64 * 2**10, 2**20, 16 * 2**20
_DISTANT_S = 0.05
"""A link with this latency is measured with a small buffer only."""
_SLOW_S = 0.05
"""If a mebibyte takes longer, no larger buffer is measured."""
_BUSY_S = 0.005
"""An all-reduce of 8 bytes that takes longer is repeated less often."""
ALL_PAIRS_UP_TO = 16
"""Most hosts for which every pair is measured (15 rounds); of more, ring neighbours are."""
T = TypeVar("T")
PAIR_S = 5.0
"""Timeout of one pair, once both hosts have started."""
_ADDRESS = re.compile(r"\[/[^\]]*:\d+\] ")


class AllReduceGroup:
    """A process group of some hosts, and its measurements."""

    def __init__(self, store: Any, *, rank: int, size: int, uses_gpus: bool, timeout_s: float) -> None:
        import torch
        from torch import distributed as dist

        timeout = timedelta(seconds=timeout_s)
        self._device = torch.device("cuda", 0) if uses_gpus else torch.device("cpu")
        if uses_gpus:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout  # noqa: SLF001 (as torch's own init_process_group does)
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, timeout)

    def latency_s(self) -> float:
        """Return the fastest all-reduce of 8 bytes."""
        self._time(8)  # connects
        repeats = 20 if self._time(8) < _BUSY_S else 2
        return min(self._time(8) for _ in range(repeats))

    def bytes_per_s(self, *, latency_s: float) -> float:
        """Return size over time of a large all-reduce, or of one as large as a slow link allows."""
        if latency_s > _DISTANT_S:
            return _SMALL / self._time(_SMALL)
        taken = min(self._time(_MIDDLE) for _ in range(2))
        return _MIDDLE / taken if taken > _SLOW_S else _LARGE / min(self._time(_LARGE) for _ in range(3))

    def _time(self, num_bytes: int) -> float:
        """Return the longest time that any member measured, so that all members decide alike."""
        import torch

        values = torch.zeros(num_bytes // 4, dtype=torch.float32, device=self._device)
        started = time.monotonic()
        self._reduce(values, largest=False)
        taken = torch.tensor([time.monotonic() - started], dtype=torch.float32, device=self._device)
        self._reduce(taken, largest=True)
        return float(taken.item())

    def _reduce(self, values: Any, *, largest: bool) -> None:
        import torch
        from torch import distributed as dist

        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        self._group.allreduce([values], options).wait()
        if values.is_cuda:
            torch.cuda.synchronize()


PairRound = list[tuple[int, int]]


def pair_rounds(num_hosts: int) -> list[PairRound]:
    """Return the rounds of pairs of host numbers; the smaller number of a pair comes first."""
    return _every_pair(num_hosts) if num_hosts <= ALL_PAIRS_UP_TO else _ring(num_hosts)


def _every_pair(num_hosts: int) -> list[PairRound]:
    """Return rounds by the circle method: one seat is fixed, the others rotate after each round."""
    seats: list[int | None] = [*range(num_hosts)]
    if num_hosts % 2:
        seats.append(None)  # its partner pauses
    plan = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        opposite = zip(seats[:half], reversed(seats[half:]), strict=True)
        plan.append([(min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return plan


def _ring(num_hosts: int) -> list[PairRound]:
    even = [(host, host + 1) for host in range(0, num_hosts - 1, 2)]
    odd = [(host, host + 1) for host in range(1, num_hosts - 1, 2)]
    closing = (0, num_hosts - 1)
    return [even, [closing, *odd]] if num_hosts % 2 == 0 else [even, odd, [closing]]


@dataclass(frozen=True, kw_only=True)
class MeasurementOrder:
    """Order of the probe."""

    rank: int
    names: tuple[str, ...]
    """Hosts by rank."""
    address: str
    """Address of the first host."""
    port: int
    interface: str | None
    uses_gpus: bool
    timeout_s: float


def main() -> None:
    """Carry out one order from stdin."""
    die_with_parent(int(sys.argv[1]))
    import torch

    torch.set_num_threads(1)
    line = sys.stdin.readline()
    if line:
        run_measurements(MeasurementOrder(**json.loads(line)))
    sys.stdout.flush()
    os._exit(0)  # at a regular exit, groups would wait for broken connections


def run_measurements(order: MeasurementOrder) -> None:
    """Measure every pair of this host, then all hosts together, and send each result."""
    from torch import distributed as dist

    deadline = time.monotonic() + order.timeout_s
    if order.interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = order.interface
    timeout = timedelta(seconds=order.timeout_s)
    try:
        store = dist.TCPStore(
            order.address, order.port, None, order.rank == 0, timeout, wait_for_workers=False, use_libuv=True
        )
    except RuntimeError as error:  # DistStoreError is one
        send_message("group", group=GroupMeasurement(problem=f"cannot join the rendezvous: {_first_line(error)}"))
        return
    succeeded = True
    for pair in (pair for pairs in pair_rounds(len(order.names)) for pair in pairs if order.rank in pair):
        found = _measure_pair(order, pair, store, deadline=deadline)
        succeeded = succeeded and found.problem is None
        if found.problem is not None or order.rank == pair[0]:
            send_message("pair", pair=found)
    if _all_succeeded(store, order, succeeded=succeeded):
        send_message("group", group=_measure_group(order, store, timeout_s=deadline - time.monotonic()))


def _measure_pair(order: MeasurementOrder, pair: tuple[int, int], store: Any, *, deadline: float) -> PairMeasurement:
    from torch import distributed as dist

    hosts = (order.names[pair[0]], order.names[pair[1]])
    prefix = dist.PrefixStore(f"pair/{pair[0]}/{pair[1]}", store)
    index = pair.index(order.rank)

    def measure() -> PairMeasurement:
        group = AllReduceGroup(prefix, rank=index, size=2, uses_gpus=order.uses_gpus, timeout_s=PAIR_S)
        latency = group.latency_s()
        return PairMeasurement(hosts=hosts, latency_s=latency, bytes_per_s=group.bytes_per_s(latency_s=latency))

    try:
        # the other host may still measure a pair that fails
        prefix.set(f"ready/{index}", "")
        prefix.wait([f"ready/{1 - index}"], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        return _within(PAIR_S, measure)
    except (RuntimeError, TimeoutError) as error:
        return PairMeasurement(hosts=hosts, problem=_first_line(error))


def _within(timeout_s: float, work: Callable[[], T]) -> T:
    """Return the result of ``work``.

    Gloo's own timeout applies to each attempt to connect.

    Raises:
        TimeoutError: it took longer; its thread ends with the process.
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


def _all_succeeded(store: Any, order: MeasurementOrder, *, succeeded: bool) -> bool:
    """Return whether all pairs of every host succeeded; otherwise the whole group would hang."""
    try:
        store.set(f"succeeded/{order.rank}", "yes" if succeeded else "no")
        return all(store.get(f"succeeded/{rank}") == b"yes" for rank in range(len(order.names)))
    except RuntimeError:  # the first host has exited, with the store
        return False


def _measure_group(order: MeasurementOrder, store: Any, *, timeout_s: float) -> GroupMeasurement:
    from torch import distributed as dist

    try:
        group = AllReduceGroup(
            dist.PrefixStore("group", store),
            rank=order.rank,
            size=len(order.names),
            uses_gpus=order.uses_gpus,
            timeout_s=max(0.1, timeout_s),
        )
        return GroupMeasurement(latency_s=group.latency_s())
    except RuntimeError as error:
        return GroupMeasurement(problem=_first_line(error))


def _first_line(error: Exception) -> str:
    """Return the first line of torch's message, without addresses."""
    return _ADDRESS.sub("", (str(error).splitlines() or ["no reason given"])[0])[:300]


if __name__ == "__main__":
    main()
