"""The parent's side stays light: no way to a plan imports a heavy package, and the host agent needs less still."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import launcher.cli
from launcher.config.registry import KINDS

HEAVY = (
    "accelerate",
    "datasets",
    "deepspeed",
    "jinja2",
    "matplotlib",
    "numpy",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
)
COMPOSITION = ("hydra", "omegaconf", "rich", "yaml")

REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise AssertionError(name + " is imported")

sys.meta_path.insert(0, Refuse())
"""


def python(code: str, *, refused: tuple[str, ...] = HEAVY) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter that fails, with the chain of imports, where a refused package is wanted."""
    command = [sys.executable, "-c", REFUSE.format(refused=refused) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def importing(*modules: str) -> str:
    return f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"


def test_verbs_and_components_import_nothing_heavy() -> None:
    verbs = [module.name for module in pkgutil.iter_modules(launcher.cli.__path__, "launcher.cli.")]
    components = [path.partition(":")[0] for kinds in KINDS.values() for path in kinds.values()]
    ended = python(importing("launcher.__main__", *verbs, *components))
    assert ended.returncode == 0, ended.stderr


def test_help_of_a_verb_does_not_load_the_configuration() -> None:
    refused = (*HEAVY, "hydra", "omegaconf", "yaml", "launcher.config.run")
    ended = python("from launcher.__main__ import main; main(['plan', '--help'])", refused=refused)
    assert ended.returncode == 0, ended.stderr


def test_processes_beside_the_ranks_import_nothing_heavy() -> None:
    ended = python(importing("launcher.trackers.sidecar"))
    assert ended.returncode == 0, ended.stderr


def test_the_host_agent_needs_neither_heavy_packages_nor_those_of_composition() -> None:
    ended = python(importing("launcher.supervision.agent_entry"), refused=(*HEAVY, *COMPOSITION))
    assert ended.returncode == 0, ended.stderr


def test_planning_the_main_experiment_imports_nothing_heavy() -> None:
    ended = python("from launcher.__main__ import main\nsys.exit(main(['+exp=zero3_gpt2xl', 'dry_run=true']))")
    assert ended.returncode == 0, ended.stderr
    assert "1,557,611,200" in ended.stdout


def test_looking_into_local_data_imports_no_package_of_the_ranks(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    with pa.output_stream(str(tmp_path / "x.jsonl.zst"), compression="zstd") as file:
        file.write(b'{"text": "some words of a row"}\n' * 900)
    pyarrow.parquet.write_table(pa.table({"text": ["some words of a row"] * 900}), tmp_path / "x.parquet")
    refused = tuple(name for name in HEAVY if name not in ("numpy", "tokenizers"))
    words = ["dry_run=true", "data=hf", "data.vocab_size=300", "job.sequence_length=16"]
    for files, path in (("x.jsonl.zst", "json"), ("x.parquet", "parquet")):
        given = [*words, f"data.path={path}", f"data.files=[{tmp_path / files}]"]
        ended = python(f"from launcher.__main__ import main\nsys.exit(main({given!r}))", refused=refused)
        assert ended.returncode == 0, ended.stderr


def test_the_refusal_refuses() -> None:
    ended = python("import torch")
    assert ended.returncode == 1
    assert "torch is imported" in ended.stderr
