"""The reference of the documentation: what scripts/reference.py makes of config classes and verbs."""

import importlib.util
from types import ModuleType

import pytest

from launcher.cli.verbs import VERBS
from launcher.config.registry import KINDS, component_class
from launcher.utils.schema import field_types
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", REPOSITORY / "scripts" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(reference: ModuleType) -> dict[str, str]:
    return reference.pages()


def test_the_committed_pages_are_current(pages: dict[str, str]) -> None:
    there = {path.name: path.read_text() for path in REPOSITORY.glob("docs/reference/*.md")}
    stale = [name for name in sorted(pages.keys() | there.keys()) if pages.get(name) != there.get(name)]
    assert not stale, "run python scripts/reference.py"


@pytest.mark.parametrize("group", KINDS)
def test_every_key_of_every_kind_has_its_row(pages: dict[str, str], group: str) -> None:
    for kind in KINDS[group]:
        for name in field_types(component_class(group, kind)):
            assert f"| `{group}.{name}` |" in pages[f"{group}.md"]


def test_every_verb_and_option_has_its_row(pages: dict[str, str]) -> None:
    for name, verb in VERBS.items():
        section = pages["commands.md"].partition(f"\n## launch {name}\n")[2].partition("\n## ")[0]
        assert section.count("\n| `-") + section.count("<code>-") == len({one for one in verb.flags if one[:2] == "--"})


def test_a_row_shows_type_limits_default_and_meaning(pages: dict[str, str]) -> None:
    job, schedule = pages["job.md"], pages["schedule.md"]
    assert "| `job.steps` | a whole number; at least 1 | `300` | Optimizer steps in the whole run;" in job
    assert "| `job.top_p` | a number; above 0; at most 1 | `1.0` |" in job
    assert "| `schedule.final_factor` | a number; between 0 and 1 | `0.1` |" in schedule


def test_an_option_shows_what_it_sets(pages: dict[str, str]) -> None:
    assert "| `hsdp` |" in pages["parallel.md"]
    assert "| `replicate=2` |" in pages["parallel.md"]
    assert "`offload_parameters=nvme` `nvme_path` (needed) " in pages["parallel.md"]
    assert "| `cosine` (default) |" in pages["schedule.md"]


def test_text_is_escaped_where_it_is_not_code(reference: ModuleType) -> None:
    assert reference._text("a | b *c* ``<x|y>`` <z>") == r"a \| b \*c\* <code>&lt;x&#124;y&gt;</code> \<z\>"
    assert reference._text("``<x>`` of   two\nlines") == "`<x>` of two lines"
