"""The comparison of servers as Markdown: medians over rounds, and how they stand to plain ``generate``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PLAIN = "generate, one by one"


def table(kept: Mapping[str, Any], *, peers: Sequence[str], contexts: Sequence[str]) -> str:
    """Return everything that was measured.

    Args:
        kept: what ``serving_peers.py`` keeps: cells by name, machine, versions, troubles.
        peers: the order of rows.
        contexts: the order of tables.
    """
    by_cell = _gathered(kept["cells"])
    parts = []
    for context in contexts:
        counts = sorted({count for _, at, count in by_cell if at == context})
        if counts:
            title = f"**{context}**: tokens/s (times plain `generate`), median of rounds; least to most in brackets"
            parts += [title, _markdown(_throughput(by_cell, peers, context, counts))]
            title = f"**{context}**: time to first token, median / 99 % (s); gap between tokens, median / 99 % (ms)"
            parts += [title, _markdown(_latencies(by_cell, peers, context, counts))]
    parts.append("\n".join(_notes(kept, by_cell)))
    return "\n\n".join(parts)


Cells = dict[tuple[str, str, int], list[dict[str, Any]]]


def _gathered(cells: Mapping[str, dict[str, Any]]) -> Cells:
    """Return the rounds of each server, context and concurrency."""
    found: Cells = defaultdict(list)
    for name, cell in cells.items():
        peer, context, count, _ = name.split(" | ")
        found[peer, context, int(count)].append(cell)
    return found


def _median(rounds: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(statistics.median(cell[key] for cell in rounds))


def _throughput(cells: Cells, peers: Sequence[str], context: str, counts: Sequence[int]) -> list[list[str]]:
    plain = {count: cells.get((PLAIN, context, count)) for count in counts}
    known = [_median(rounds, "tokens_per_s") for rounds in plain.values() if rounds]
    base = statistics.median(known) if known else None
    rows = [["server", *(f"{count} at a time" for count in counts)]]
    for peer in peers:
        row = [peer]
        for count in counts:
            rounds = cells.get((peer, context, count))
            row.append(_cell(rounds, base) if rounds else "")
        if any(row[1:]):
            rows.append(row)
    return rows


def _cell(rounds: Sequence[Mapping[str, Any]], base: float | None) -> str:
    values = [cell["tokens_per_s"] for cell in rounds]
    ratio = f" ({statistics.median(values) / base:.2f} ×)" if base else ""
    spread = f" [{min(values):.0f} to {max(values):.0f}]" if len(values) > 1 else ""
    errors = sum(int(cell["errors"]) for cell in rounds)
    return f"{statistics.median(values):.1f}{ratio}{spread}" + (f" {errors} errors" if errors else "")


def _latencies(cells: Cells, peers: Sequence[str], context: str, counts: Sequence[int]) -> list[list[str]]:
    rows = [["server", *(f"{count} at a time" for count in counts)]]
    for peer in peers:
        row = [peer]
        for count in counts:
            rounds = cells.get((peer, context, count))
            if not rounds or not any(cell["requests"] for cell in rounds):
                row.append("")
                continue
            first = " / ".join(f"{_median(rounds, f'ttft_p{share}_s'):.2f}" for share in (50, 99))
            gap = " / ".join(f"{1000 * _median(rounds, f'itl_p{share}_s'):.0f}" for share in (50, 99))
            row.append(f"{first}; {gap}")
        if any(row[1:]):
            rows.append(row)
    return rows


def _notes(kept: Mapping[str, Any], cells: Cells) -> Iterator[str]:
    everything = [cell for rounds in cells.values() for cell in rounds]
    if everything:
        shares = [cell["client_cpu_share"] for cell in everything]
        loads = [cell["load_average"] for cell in everything]
        yield f"- load generator: {statistics.median(shares):.1%} of a core, at most {max(shares):.1%}"
        yield f"- load average of the machine: {statistics.median(loads):.1f}, at most {max(loads):.1f}"
    for machine in kept.get("machine", ()):
        yield "- " + "; ".join(machine.splitlines())
    for name, text in kept.get("versions", {}).items():
        yield f"- {name}: {text}"
    for name, why in kept.get("troubles", {}).items():
        yield f"- {name} did not start: {why}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
