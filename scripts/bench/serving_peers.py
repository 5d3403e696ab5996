"""Our server against others on the same model, measured in turn by the same load generator.

    python scripts/bench/serving_peers_make.py DIR                      environments and models, once
    python scripts/bench/serving_peers.py --peers DIR --out cells.json  measure what is missing there, print the table
    python scripts/bench/serving_peers.py --peers DIR --out cells.json --table

All servers start first and stay up; all but the measured one are suspended (SIGSTOP). Each round measures all of them
(A B A B), so that a slow minute of the machine affects all. Every server gets the same prompts; each round has its own,
so that no prompt cache helps. A cell keeps a number of requests in flight until a number is answered, or until its
time limit: then the answers so far count. Prefill counts in all cells.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import describe_machine
from serving_peers_start import Peer, Server, peers, versions
from serving_peers_table import table

from launcher.benchmarks.load_client import LoadTarget
from launcher.benchmarks.load_generator import Slo, closed_loop, random_requests, summarize_load, tokens_between
from launcher.config.benchmark.serving import parse_length_distribution, parse_server_address
from launcher.utils.files import read_json, write_json

CONCURRENCY = (1, 4, 8, 16, 32)


@dataclass(frozen=True)
class Context:
    """Words of a prompt, a token each or a little more, and tokens of an answer.

    Attributes:
        turns: requests for each that is under way; there are at least ``FEWEST``.
    """

    inputs: str
    outputs: str
    turns: int


FEWEST = 3
CONTEXTS = {"mixed": Context("16-256", "16-128", turns=2), "512+": Context("512-640", "32-96", turns=1)}
_ALONE, _BATCHES = "one by one", "batches of 8"
"""In names of servers whose throughput does not grow beyond so many at a time: they are measured there alone."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement."""

    peer: str
    context: str
    concurrency: int
    round_: int

    @property
    def name(self) -> str:
        """Its key in the file of cells."""
        return f"{self.peer} | {self.context} | {self.concurrency} | {self.round_}"


def cells(names: Sequence[str], *, contexts: Sequence[str], concurrency: Sequence[int], rounds: int) -> list[Cell]:
    """Return all cells in the order in which they are measured: servers take turns first."""
    return [
        Cell(peer=peer, context=context, concurrency=count, round_=round_)
        for round_, context, count, peer in itertools.product(range(rounds), contexts, concurrency, names)
        if not (_ALONE in peer and count > 1) and not (_BATCHES in peer and count in (4, 16))
    ]


def measure(cell: Cell, server: Server, *, most_s: float) -> dict[str, Any]:
    """Return the figures of one cell; ``tokens_per_s`` is over all of it, reading the prompts included."""
    server.ask("One two", max_tokens=1)  # answered once what the cell before has left behind is over
    context, peer = CONTEXTS[cell.context], server.peer
    inputs, outputs = parse_length_distribution(context.inputs), parse_length_distribution(context.outputs)
    target = LoadTarget(address=parse_server_address(server.url), model=peer.model, extra_body=peer.extra)
    calls = random_requests(seed=1000 * cell.round_ + cell.concurrency, input_len=inputs, output_len=outputs)
    some = itertools.islice(calls, max(FEWEST, context.turns * cell.concurrency))
    load = closed_loop(target, some, max_concurrency=cell.concurrency, seconds=most_s)
    found: dict[str, Any] = summarize_load(load, slo=Slo())
    found["tokens_per_s"] = tokens_between(load.outcomes, 0.0, load.elapsed_s) / load.elapsed_s
    found["load_average"] = os.getloadavg()[0]
    found["why"] = sorted({outcome.why for outcome in load.outcomes if outcome.why})[:3]
    return found


def start(wanted: Mapping[str, Peer], *, logs: Path) -> tuple[dict[str, Server], dict[str, str]]:
    """Start servers one after the other; return those that answer, and why the others do not."""
    running, troubles = {}, {}
    for name, peer in wanted.items():
        print(f"starting {name}", flush=True)
        try:
            server = Server(peer, logs=logs)
        except OSError as error:
            troubles[name] = str(error)
            continue
        try:
            server.wait()
        except RuntimeError as trouble:
            print(trouble, flush=True)
            troubles[name] = str(trouble).splitlines()[0]
            server.close()
        else:
            print(f"  it says: {server.ask('The capital of France is', max_tokens=12)!r}", flush=True)
            server.pause()
            running[name] = server
    return running, troubles


def main() -> None:
    """Measure, keep every cell as soon as it is there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder that serving_peers_make.py filled")
    parser.add_argument("--out", type=Path, required=True, help="file of cells; those in it are not measured again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=float, default=75.0, help="time limit of a cell in seconds")
    parser.add_argument("--only", nargs="*", help="names of servers, or parts of names")
    parser.add_argument("--contexts", nargs="*", default=list(CONTEXTS), choices=CONTEXTS)
    parser.add_argument("--concurrency", nargs="*", type=int, default=list(CONCURRENCY))
    parser.add_argument("--table", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("received SIGTERM"))  # the servers go too
    known = peers(arguments.peers.resolve())
    wanted = {name: peer for name, peer in known.items() if not arguments.only or _is_named(name, arguments.only)}
    kept = read_json(arguments.out) if arguments.out.exists() else {"cells": {}, "machine": [], "versions": {}}
    if not arguments.table:
        todo = cells(
            list(wanted), contexts=arguments.contexts, concurrency=arguments.concurrency, rounds=arguments.rounds
        )
        todo = [cell for cell in todo if cell.name not in kept["cells"]]
        print(f"{len(todo)} cells, at most {len(todo) * arguments.most / 60:.0f} minutes", flush=True)
        _measure_all(todo, wanted, kept, arguments)
    print(table(kept, peers=list(known), contexts=list(CONTEXTS)))


def _is_named(name: str, parts: Sequence[str]) -> bool:
    return any(part == name or (part in name and part not in ("generate",)) for part in parts)


def _measure_all(
    todo: Sequence[Cell], wanted: Mapping[str, Peer], kept: dict[str, Any], arguments: argparse.Namespace
) -> None:
    logs = arguments.out.resolve().with_suffix("")
    logs.mkdir(parents=True, exist_ok=True)
    names = {cell.peer for cell in todo}
    running, troubles = start({name: peer for name, peer in wanted.items() if name in names}, logs=logs)
    kept["versions"] |= {name: versions(peer) for name, peer in wanted.items()}
    kept["machine"].append(describe_machine("torch", "transformers"))
    kept["troubles"] = troubles
    try:
        for number, cell in enumerate(todo, 1):
            if cell.peer not in running:
                continue
            server = running[cell.peer]
            server.go_on()
            try:
                found = measure(cell, server, most_s=arguments.most)
            except OSError as error:
                print(f"{cell.name}: {error}; it is not measured any more", flush=True)
                troubles[cell.peer] = f"failed at {cell.name}: {error}"
                running.pop(cell.peer).close()
                continue
            server.pause()
            kept["cells"][cell.name] = found
            write_json(arguments.out, kept)
            shown = json.dumps({key: round(found[key], 3) for key in ("tokens_per_s", "requests", "errors")})
            print(f"{number}/{len(todo)}  {cell.name}: {shown} load {found['load_average']:.1f}", flush=True)
    finally:
        for server in running.values():
            server.close()


if __name__ == "__main__":
    main()
