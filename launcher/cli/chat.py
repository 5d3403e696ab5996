"""``launch chat``: talk to a model in the terminal."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from launcher.checkpoint.resume import parse_reference
from launcher.cli.arguments import Arguments
from launcher.config.compose import compose
from launcher.config.folders import groups
from launcher.config.model.hf import is_model_folder
from launcher.config.option_text import quoted_text
from launcher.errors import ConfigError
from launcher.execution.prepare import PreparedRun, prepare
from launcher.execution.saved_models import find_run_or_checkpoint
from launcher.planning.render import render_plan
from launcher.utils.system import run_in_foreground

_DEFAULTS = {
    "job.temperature": "0.7",
    "job.max_tokens": "512",
    "job.max_num_seqs": "1",
    "parallel": "single",
    "backend.ranks": "1",
    "tracker": "local",
}


def run(arguments: Arguments) -> int:
    """Compose a run of the model, and talk to it in a process with torch."""
    prepared = _prepare(arguments)
    if arguments.dry_run:
        print(render_plan(prepared.plan), end="")
        return 0
    with prepared.locks, tempfile.TemporaryDirectory() as folder:
        snapshot = Path(folder) / "run.yaml"
        snapshot.write_text(prepared.snapshot, encoding="utf-8")
        return run_in_foreground([sys.executable, "-m", "launcher.jobs.chat", str(snapshot)])


def _prepare(arguments: Arguments) -> PreparedRun:
    given = dict(word.lstrip("+").partition("=")[::2] for word in arguments.overrides)
    if given.get("job", "generate") != "generate":
        raise _not_here("job", given["job"])
    usual = {"job": "generate", **_model_options(arguments), **_DEFAULTS}
    words = [f"{name}={value}" for name, value in usual.items() if name not in given]
    composed = compose([*words, *arguments.overrides], config_dir=arguments.config_dir)
    if (backend := composed.run.backend.kind) != "local":
        raise _not_here("backend", backend)
    prepared = prepare(composed)
    if (ranks := prepared.plan.world_size) > 1:
        raise _not_here("backend.ranks", ranks)
    return prepared


def _not_here(option: str, value: object) -> ConfigError:
    why = "launch chat runs one engine in one process of this machine"
    return ConfigError(option, value, why=why, fix=f"leave {option} out; job=serve serves a model in other ways")


def _model_options(arguments: Arguments) -> dict[str, str]:
    """Return the options that choose the model.

    Raises:
        ConfigError: the word names none.
    """
    word = arguments.source
    if word in groups(arguments.config_dir).get("model", []):
        return {"model": word, "model.weights": "pretrained"}
    folder = Path(word).expanduser()
    if is_model_folder(folder):
        return {"model": "hf", "model.name": quoted_text(str(folder.absolute()), escape=True)}
    if folder.suffix == ".gguf" and folder.is_file():
        return {"model.weights": quoted_text(str(folder.absolute()), escape=True)}
    try:
        found = find_run_or_checkpoint(word, arguments.root, option="run")
    except ConfigError:
        if not _is_hub_name(word):
            raise
        return {"model": "hf", "model.name": quoted_text(word, escape=True)}
    if found is None:
        fix = "name a run, a model folder, an option of launch list model, or a hub name (org/model)"
        raise ConfigError("run", word, why="is neither a run nor a model", fix=fix)
    selector = parse_reference(word).selector
    return {"model.weights": quoted_text(f"{found}@{selector}" if selector else str(found), escape=True)}


def _is_hub_name(word: str) -> bool:
    return word.count("/") == 1 and "@" not in word and not word.startswith((".", "~", "/"))
