"""``launch benchmark compare``: whether any quantity is worse in the second of two runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.cli.arguments import Arguments
from launcher.config.paths import is_named_path
from launcher.errors import ConfigError
from launcher.protocol.quantities import label, spread
from launcher.protocol.results import BenchmarkRecord, read_benchmark_record
from launcher.runs.benchmark_comparison import BenchmarkComparison, Difference, compare_measurements
from launcher.runs.index import find_run
from launcher.utils.text import format_table, json_text, printable

_USUAL = "5%"


def run(arguments: Arguments) -> int:
    """Compare two runs of a benchmark."""
    names = (arguments.a, arguments.b)
    agree, threshold = arguments.agree, _threshold(arguments)
    before, after = (_measured(name, arguments.root) for name in names)
    found = _comparable(names, before, after)
    failed = [one for one in found.differences if (not one.agrees if agree else one.verdict(threshold) == "worse")]
    if arguments.json:
        print(json_text(_tree(found, threshold)))
    else:
        print(printable("\n".join(_lines(found, threshold, agree=agree, num_failed=len(failed)))))
    return 1 if failed else 0


def _threshold(arguments: Arguments) -> float:
    """Return the accepted change as a share.

    Raises:
        ConfigError: it is not a share, or --agree is given too.
    """
    given = arguments.threshold
    if given is not None and arguments.agree:
        raise ConfigError(
            "--threshold", given, why="cannot be combined with --agree, which compares ranges", fix="leave one out"
        )
    text = given or _USUAL
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf:
        raise ConfigError("--threshold", text, why="is not a share", fix="write --threshold 5% or 0.05")
    return share


def _measured(name: str, root: Path) -> BenchmarkRecord:
    """Return the record of a run or of a benchmark.json file.

    Raises:
        ConfigError: there is no such run or file, or it is not of a benchmark.
    """
    path = (
        Path(name).resolve()
        if is_named_path("run", name) and Path(name).is_file()
        else find_run(name, root).benchmark("json")
    )
    try:
        return read_benchmark_record(path)
    except FileNotFoundError as error:
        why, fix = "has no benchmark.json: it is not of job=benchmark, or did not complete", "name another run"
        raise ConfigError("run", name, why=why, fix=fix) from error
    except (OSError, ValueError) as error:
        raise ConfigError("benchmark.json", path, why=str(error), fix="name the results of a benchmark") from error


def _comparable(names: Sequence[str], before: BenchmarkRecord, after: BenchmarkRecord) -> BenchmarkComparison:
    """Return the comparison.

    Raises:
        ConfigError: the two have no case in common.
    """
    shown = " ".join(names)
    if before.kind != after.kind:
        why = f"one is of benchmark={before.kind}, the other of benchmark={after.kind}"
        raise ConfigError("benchmark compare", shown, why=why, fix="name two runs of the same benchmark")
    found = compare_measurements(before, after)
    if not found.differences:
        why = f"no case is in both: {', '.join(before.cases)} in one, {', '.join(after.cases)} in the other"
        raise ConfigError("benchmark compare", shown, why=why, fix="name two runs with the same cases")
    return found


def _lines(found: BenchmarkComparison, threshold: float, *, agree: bool, num_failed: int) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("case", "quantity", "A", "B", "B / A", "")]
    for one in found.differences:
        verdict = ("agrees" if one.agrees else "apart") if agree else one.verdict(threshold)
        sides = [spread(one.quantity, side) for side in (one.before, one.after)]
        rows.append((one.case, label(one.quantity), *sides, f"{one.ratio:.3f}", verdict))
    yield from format_table(rows)
    for where, names in (("A", found.only_before), ("B", found.only_after)):
        if names:
            yield f"only in {where}: {', '.join(names)}"
    for what, apart in (("other options", found.options), ("another machine", found.machine)):
        if apart:
            yield f"{what}: {'; '.join(f'{name} {one} → {other}' for name, one, other in apart)}"
    number = f"{num_failed} of {len(found.differences)}"
    if agree:
        yield f"{number} lie outside the other's range" if num_failed else "each median lies within the other's range"
    else:
        yield f"{number} worse by more than {threshold:.3g} and both spreads"


def _tree(found: BenchmarkComparison, threshold: float) -> dict[str, Any]:
    return {
        "threshold": threshold,
        "differences": [_difference(one, threshold) for one in found.differences],
        "only_in_a": list(found.only_before),
        "only_in_b": list(found.only_after),
        "options": {name: [one, other] for name, one, other in found.options},
        "machine": {name: [one, other] for name, one, other in found.machine},
    }


def _difference(one: Difference, threshold: float) -> dict[str, Any]:
    return {
        "case": one.case,
        "quantity": one.quantity,
        "a": list(one.before),
        "b": list(one.after),
        "ratio": one.ratio if math.isfinite(one.ratio) else None,
        "verdict": one.verdict(threshold),
        "agrees": one.agrees,
    }
