"""Idle share of pipeline schedules, and how many micro-batches' activations a stage holds, against theory.

Stages take a known time: they sleep in forward and backward instead of computing, so the number of cores does not
matter. Schedules are made by the code that the engine uses. Goal: idle shares within 3 points of theory.

    python scripts/bench/pipeline_bubble.py [--unit-ms 200] [--repeats 3] [--schedules zbv 1f1b] [--stages 4]

A busy machine wakes a sleeper late, and schedules without slack pass on every delay: give it a longer unit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import print_machine
from pipeline_theory import Pass, formula, longest_path
from torch import Tensor, nn
from torch import distributed as dist

from launcher.engines.pipelining.schedules import make_schedule, own_stretches
from launcher.parallel.pipeline import Pipeline, ScheduleName, micro_batch_choices

RANKS, MICRO_BATCHES = (2, 4), (2, 4, 8, 16)
SCHEDULES: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
GOAL = 0.03


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of the table."""

    schedule: ScheduleName
    ranks: int
    micro_batches: int

    @property
    def chunks(self) -> int:
        """Stretches of layers on each rank."""
        return Pipeline(schedule=self.schedule).num_chunks


class Meter:
    """What one rank does in one step."""

    def __init__(self) -> None:
        self.unit_s, self.busy_s, self.live, self.most_live = 0.0, 0.0, 0, 0

    def work(self) -> None:
        """Take a known time."""
        started = time.perf_counter()
        time.sleep(self.unit_s)
        self.busy_s += time.perf_counter() - started

    def hold(self, activation: Tensor) -> None:
        """Count an activation until nothing refers to it."""
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        weakref.finalize(activation, self._let_go)

    def _let_go(self) -> None:
        self.live -= 1


class _OfInput(torch.autograd.Function):  # type: ignore[misc]
    """The part of a stage whose backward pass gives the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, meter: Meter) -> Tensor:
        activation = hidden.clone()
        meter.work()
        meter.hold(activation)
        ctx.save_for_backward(activation)
        ctx.meter = meter
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        ctx.meter.work()
        return gradients[0].clone(), None


class _OfWeight(torch.autograd.Function):  # type: ignore[misc]
    """The part of a stage whose backward pass gives the gradient of its weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, meter: Meter) -> Tensor:
        ctx.meter = meter
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        ctx.meter.work()
        return gradients[0].clone(), None


class Sleeper(nn.Module):  # type: ignore[misc]
    """A stage that takes the same time for a forward pass, for the gradient of its input and for that of its weight."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self._meter = meter

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what came in, later."""
        kept = _OfInput.apply(hidden, self._meter)
        return kept + _OfWeight.apply(self.weight, self._meter)


def one_rank(rank: int, settings: Sequence[Setting], port: int, unit_s: float, repeats: int, folder: str) -> None:
    """Take part in every setting; write seconds from start to end, busy seconds and live activations."""
    torch.set_num_threads(1)
    ranks = settings[0].ranks
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    found = []
    for setting in settings:
        meter = Meter()
        count, seconds = ranks * setting.chunks, unit_s / setting.chunks
        meta = torch.empty(1, 1, device="meta", requires_grad=True)
        numbers = own_stretches(setting.schedule, rank=rank, ranks=ranks, chunks=setting.chunks)
        schedule = make_schedule(
            setting.schedule,
            [(number, Sleeper(meter), (meta, meta)) for number in numbers],
            count=count,
            micro_batches=setting.micro_batches,
            loss=lambda output, target: (output * target).sum(),
            device=torch.device("cpu"),
            group=dist.group.WORLD,
        )
        ones = torch.ones(setting.micro_batches, 1)
        steps = []
        for number in range(1 + repeats):
            meter.unit_s = seconds if number else 0.0  # the first one connects the ranks
            dist.barrier()
            meter.busy_s = meter.live = meter.most_live = 0
            started = time.perf_counter()
            schedule.step(*([ones.requires_grad_()] if 0 in numbers else []), target=ones.detach())
            steps.append({"wall_s": time.perf_counter() - started, "busy_s": meter.busy_s, "live": meter.most_live})
        found.append({"steps": steps[1:], "order": order_of(schedule)})
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def order_of(schedule: Any) -> dict[int, list[Pass]]:
    """Return the passes of each rank, where torch lists them rightly: it does for schedules of several stretches."""
    if len(getattr(schedule, "_stages", ())) < 2:
        return {}
    return {
        rank: [(a.stage_index, a.computation_type.value, a.microbatch_index) for a in actions if a is not None]
        for rank, actions in schedule.pipeline_order.items()
    }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was found for one setting."""

    idle: float
    """Share of all ranks' time, the least of all steps: what else the machine does only adds to it."""
    theory: float
    full: bool
    """Whether there are enough micro-batches for a formula to hold."""
    live: list[int]
    """Most micro-batches' activations held at once, by rank, all its stretches together."""


def measure(settings: Sequence[Setting], *, unit_s: float, repeats: int) -> list[Outcome]:
    """Run the settings, all of equally many ranks, one after the other."""
    ranks = settings[0].ranks
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        context = multiprocessing.get_context("spawn")
        args = [(rank, settings, port, unit_s, repeats, folder) for rank in range(ranks)]
        processes = [context.Process(target=one_rank, args=each) for each in args]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert all(process.exitcode == 0 for process in processes), "a rank failed"
        by_rank = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return [_outcome(setting, list(found)) for setting, found in zip(settings, zip(*by_rank, strict=True), strict=True)]


def _outcome(setting: Setting, found: Sequence[dict[str, Any]]) -> Outcome:
    """Return what the ranks' findings come to."""
    idle = [
        1 - sum(step["busy_s"] for step in same) / (setting.ranks * max(step["wall_s"] for step in same))
        for same in zip(*(of_rank["steps"] for of_rank in found), strict=True)
    ]
    theory = formula(setting.schedule, ranks=setting.ranks, micro_batches=setting.micro_batches, chunks=setting.chunks)
    by_path = longest_path(found[0]["order"], stretches=setting.ranks * setting.chunks) if found[0]["order"] else theory
    assert by_path is not None, "a schedule has a formula or an order"
    assert theory is None or abs(theory - by_path) < 1e-9, f"{setting}: formula {theory}, longest path {by_path}"
    return Outcome(
        idle=min(idle),
        theory=by_path,
        full=theory is not None,
        live=[max(step["live"] for step in of_rank["steps"]) for of_rank in found],
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unit-ms", type=float, default=200.0, help="a rank's forward pass of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--stages", nargs="+", type=int, default=RANKS)
    given = parser.parse_args()

    print_machine("torch")
    print("\n| schedule | stages | micro-batches | idle, theory | idle, measured | live activations by rank |")
    print("|---|---|---|---|---|---|", flush=True)
    misses = []
    for ranks in given.stages:
        settings = [
            Setting(schedule=schedule, ranks=ranks, micro_batches=m)
            for schedule in given.schedules
            for m in MICRO_BATCHES
            if m in micro_batch_choices(schedule, stages=ranks, wanted=m)
        ]
        measured = measure(settings, unit_s=given.unit_ms / 1000, repeats=given.repeats)
        for setting, found in zip(settings, measured, strict=True):
            theory = f"{found.theory:.1%}{'' if found.full else ' *'}"
            print(
                f"| {setting.schedule} | {ranks} | {setting.micro_batches} | {theory}"
                f" | {found.idle:.1%} | {', '.join(map(str, found.live))} |",
                flush=True,
            )
            if abs(found.idle - found.theory) > GOAL:
                misses.append(f"{setting}: {found.idle:.1%} instead of {found.theory:.1%}")
            if setting.schedule == "gpipe":
                assert max(found.live) == setting.micro_batches, "GPipe holds all micro-batches"
            if setting.schedule == "1f1b":
                assert max(found.live) <= ranks, "1F1B holds no more micro-batches than there are stages"
    print("\n* too few micro-batches to fill the pipeline: the longest path through the schedule's order")
    print(f"within {GOAL:.0%} of theory: {'all' if not misses else ''}{'; '.join(misses)}")


if __name__ == "__main__":
    main()
