"""``launch export``: a run's weights and tokenizer as a folder that Transformers loads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.checkpoint.locks import ReadLock
from launcher.checkpoint.store import SavedCheckpoint
from launcher.cli.arguments import Arguments, path_value
from launcher.config.export import ExportOptions
from launcher.errors import ConfigError, ConfigErrors
from launcher.execution.saved_models import (
    files_of_model,
    find_intact_checkpoint,
    find_run_or_checkpoint,
    quantized_model,
    select_checkpoints,
)
from launcher.protocol.state_files import MODEL_FOLDER
from launcher.utils.progress import byte_progress
from launcher.utils.schema import build
from launcher.utils.system import run_in_foreground
from launcher.utils.text import printable, shell_command, short_path

_BLOCK_BYTES = 1 << 20
"""Read between two calls of a heartbeat."""


def run(arguments: Arguments) -> int:
    """Find the checkpoint, and write it in a process with torch."""
    options = _options(arguments.settings)
    target = path_value("DIR")(arguments.folder).absolute()
    _check_target(target)
    saved = _checkpoint(arguments.source, arguments.root)
    source = saved.folder / MODEL_FOLDER
    command = [sys.executable, "-m", "launcher.jobs.export", str(source), str(target), options.dtype]
    with ReadLock(saved.folder):
        code = run_in_foreground([*command, str(options.max_shard_bytes)])
    if code == 0:
        folder = short_path(target)
        print(printable(f"exported step {saved.manifest.step} of {short_path(saved.folder.parent.parent)} to {folder}"))
        print(printable(f"use it: AutoModelForCausalLM.from_pretrained({folder!r}), or "), end="")
        print(printable(shell_command(["launch", "chat", folder])))
    return code


def _options(words: Sequence[str]) -> ExportOptions:
    """Return the options of the verb.

    Raises:
        ConfigErrors: one is unknown or has a wrong value.
    """
    tree = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            why = "is neither RUN, DIR nor option=value"
            raise ConfigError(word, why=why, fix="write launch export RUN DIR dtype=bf16")
        tree[name] = value
    errors: list[ConfigError] = []
    options = build(ExportOptions, tree, path="", report=errors.append)
    if options is not None:
        errors += options.validate()
    if errors or options is None:
        raise ConfigErrors(errors)
    return options


def _check_target(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ConfigError("DIR", target, why="is there already", fix="name a folder that does not exist, or remove it")
    if not target.parent.is_dir():
        raise ConfigError("DIR", target, why=f"there is no folder {target.parent}", fix="create it, or choose another")


def _checkpoint(word: str, root: Path) -> SavedCheckpoint:
    """Return the verified checkpoint to export.

    Raises:
        ConfigError: ``word`` leads to none.
    """
    folder = find_run_or_checkpoint(word, root, option="run")
    if folder is None:
        fix = "name a run that launch runs lists, or a folder checkpoints/step_…"
        raise ConfigError("run", word, why="is neither a run nor a checkpoint", fix=fix)
    if (quantized := quantized_model(folder)) is not None:
        why = f"is a run of job=quantize, whose weights are files already: {quantized}"
        raise ConfigError("run", word, why=why, fix="copy that folder, or export the run that was quantized")
    first = next(select_checkpoints(folder, word, option="run"))
    size = sum(first.manifest.files[name] for name in files_of_model(first))
    with byte_progress("verifying", size) as read:
        return find_intact_checkpoint(folder, word, option="run", heartbeat=lambda: read(_BLOCK_BYTES))
