from dataclasses import dataclass, field
from typing import Literal

import pytest

from launcher.errors import ConfigError
from launcher.utils.schema import build, defaults, to_tree

NOT_FINITE = ("nan", "-Infinity", float("nan"), float("inf"), 10**400)


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Sample:
    count: int
    ratio: float = 1.0
    mode: Literal["a", "b"] = "a"
    slots: int | Literal["auto"] = "auto"
    pair: tuple[float, float] = (0.1, 0.2)
    names: tuple[str, ...] = ()
    note: str | None = None
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    table: dict[str, int] = field(default_factory=dict)


def problems_of(tree):
    found: list[ConfigError] = []
    built = build(Sample, tree, path="s", report=found.append)
    assert (built is None) == bool(found)
    return built, [str(error) for error in found]


def test_a_tree_becomes_values_and_a_tree_again():
    tree = {
        "count": 5e8,
        "ratio": "1e-4",
        "mode": "b",
        "slots": 3,
        "pair": [1, 2],
        "names": ["x"],
        "note": "n",
        "flag": True,
        "inner": {"rate": 2},
        "table": {"k": 1},
    }
    built, _ = problems_of(tree)
    assert built == Sample(
        count=500_000_000,
        ratio=1e-4,
        mode="b",
        slots=3,
        pair=(1.0, 2.0),
        names=("x",),
        note="n",
        flag=True,
        inner=Inner(rate=2.0),
        table={"k": 1},
    )
    assert problems_of(to_tree(built))[0] == built


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "s.count: has no value"),
        ({"count": "???"}, "s.count: has no value"),
        ({"count": 1.5}, "s.count=1.5: is a number; give a whole number"),
        ({"count": True}, "s.count=true: is true or false; give a whole number"),
        ({"count": None}, "s.count=null: is null"),
        (
            {"count": 99999999999999999999},
            "s.count=99999999999999999999: does not fit into 64 bits; give a number from -",
        ),
        ({"count": -(2**63) - 1}, "does not fit into 64 bits"),
        ({"count": 1e30}, "s.count=1e+30: does not fit into 64 bits"),
        ({"count": 1, "slots": 2**63}, "s.slots=9223372036854775808: does not fit into 64 bits"),
        ({"count": 1, "table": {"k": 2**63}}, "s.table.k=9223372036854775808: does not fit into 64 bits"),
        ({"count": 1, "ratio": "fast"}, "s.ratio=fast: is text; give a number"),
        *(({"count": 1, "ratio": value}, "must be finite; give a number") for value in NOT_FINITE),
        *(({"count": value}, "must be finite; give a whole number") for value in NOT_FINITE[:-1]),
        ({"count": 1, "slots": float("nan")}, "s.slots=nan: must be finite; give a whole number or auto"),
        ({"count": 1, "pair": [1, float("inf")]}, "s.pair[1]=inf: must be finite"),
        ({"count": 1, "table": {"k": "-inf"}}, "s.table.k=-inf: must be finite"),
        ({"count": 10**400}, "does not fit into 64 bits"),
        ({"count": 1, "mode": "c"}, "s.mode=c: is not one of a, b"),
        ({"count": 1, "slots": "many"}, "give a whole number or auto"),
        ({"count": 1, "pair": [1]}, "s.pair"),
        ({"count": 1, "names": "x"}, "give a list of text"),
        ({"count": 1, "flag": "yes"}, "s.flag=yes: is text; give true or false"),
        ({"count": 1, "inner": {"rte": 1}}, "s.inner.rte: no such option; did you mean rate?"),
        ({"count": 1, "table": {"k": "x"}}, "s.table.k=x"),
        ({"count": 1, "cuont": 2}, "s.cuont: no such option; did you mean count?"),
    ],
)
def test_a_mistake_is_named(tree, message):
    _, messages = problems_of(tree)
    assert any(message in text for text in messages), messages


def test_the_largest_whole_numbers_fit():
    built, messages = problems_of({"count": 2**63 - 1, "slots": -(2**63), "ratio": 1e30})
    assert (built.count, built.slots, built.ratio, messages) == (2**63 - 1, -(2**63), 1e30, [])


def test_all_mistakes_come_at_once():
    _, messages = problems_of({"count": "x", "mode": "c", "extra": 1, "inner": {"rate": "y"}})
    assert len(messages) == 4


def test_defaults_are_plain_data():
    assert defaults(Sample)["inner"] == {"rate": 0.5}
    assert defaults(Sample)["pair"] == [0.1, 0.2]
    assert "count" not in defaults(Sample)
