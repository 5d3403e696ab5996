"""``launch resume DIR``: continue a run in its own directory, from its newest complete checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.commandline import parse_command_line
from launcher.compose import Composed
from launcher.config import build_run, run_to_tree
from launcher.errors import ConfigError, ConfigErrors
from launcher.launching import prepare, start
from launcher.overrides import parse_overrides
from launcher.rundir import RunDir
from launcher.snapshot import load_run

HELP = """\
launch resume DIR [OVERRIDES]: continue the run in DIR from its newest complete checkpoint.

  launch resume runs/gpt2_tiny/20260101-120000-abcd
  launch resume runs/gpt2_tiny/20260101-120000-abcd job.steps=400    train on, further than planned

The run keeps its directory and its W&B id. At the same number of ranks it continues exactly.
"""


def run(arguments: Sequence[str]) -> int:
    """Resume the run whose directory is the first argument."""
    line = parse_command_line(arguments)
    if line.help or not line.words:
        print(HELP)
        return 0 if line.help else 2
    folder, words = Path(line.words[0]), line.words[1:]
    if not RunDir(folder).snapshot.is_file():
        raise ConfigError("resume", folder, why="holds no run.yaml", fix="name a run directory (runs/<name>/<id>)")
    composed = _continued(folder, words)
    return start(prepare(composed))


def _continued(folder: Path, words: Sequence[str]) -> Composed:
    """Return the run of ``folder`` with values changed by ``words``, set to continue where it stopped."""
    mistakes: list[ConfigError] = []
    tree = run_to_tree(load_run(RunDir(folder).snapshot))
    for override in parse_overrides(words, {}, sweeping=False, report=mistakes.append):
        _set(tree, override.key, override.word, mistakes)
    run = build_run(tree, mistakes.append)
    if run is None or mistakes:
        raise ConfigErrors(mistakes)
    run = replace(
        run,
        run=replace(run.run, dir=str(folder)),
        checkpoint=replace(run.checkpoint, resume="auto"),
    )
    return Composed(run=run, tree=run_to_tree(run), sweep=None, overrides=tuple(words))


def _set(tree: dict[str, Any], key: str, word: str, mistakes: list[ConfigError]) -> None:
    from omegaconf import OmegaConf

    if "." not in key:
        fix = "change single values (job.steps=400), or start a new run with checkpoint.resume=DIR"
        mistakes.append(ConfigError(key, why="would change the kind of run", fix=fix))
        return
    changed = OmegaConf.merge(OmegaConf.create(tree), OmegaConf.from_dotlist([word.lstrip("+")]))
    tree.clear()
    tree.update(OmegaConf.to_container(changed))
