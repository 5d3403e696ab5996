"""``launch export``: a run's weights and tokenizer as a folder that Transformers loads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.checkpoint.adapter_base import base_weights, is_same_base, missing_base
from launcher.checkpoint.locks import CheckpointLocks
from launcher.checkpoint.store import SavedCheckpoint
from launcher.cli.arguments import Arguments, path_value
from launcher.config.export import ExportOptions
from launcher.config.snapshot import load_run
from launcher.errors import ConfigError, ConfigErrors
from launcher.execution.saved_models import (
    find_intact_checkpoint,
    find_run_or_checkpoint,
    quantized_model,
)
from launcher.protocol.rundir import RunDir
from launcher.protocol.state_files import MODEL_FOLDER
from launcher.utils.schema import build
from launcher.utils.system import run_in_foreground
from launcher.utils.text import printable, shell_command, short_path

_BOOLEANS: dict[str, object] = {"true": True, "false": False}


def run(arguments: Arguments) -> int:
    """Find the checkpoint, and write it in a process with torch."""
    options = _options(arguments.settings)
    target = path_value("DIR")(arguments.folder).absolute()
    _check_target(target)
    with CheckpointLocks() as locks:
        saved = _checkpoint(arguments.source, arguments.root, locks=locks)
        source = saved.folder / MODEL_FOLDER
        merged = _snapshot_to_merge(saved) if options.merge else []
        command = [sys.executable, "-m", "launcher.jobs.export", str(source), str(target), options.dtype]
        code = run_in_foreground([*command, str(options.max_shard_bytes), *merged])
    if code == 0:
        folder = short_path(target)
        if saved.manifest.adapter and not options.merge:
            _print_adapter(saved, folder)
            return code
        print(printable(f"exported step {saved.manifest.step} of {short_path(saved.folder.parent.parent)} to {folder}"))
        print(printable(f"use it: AutoModelForCausalLM.from_pretrained({folder!r}), or "), end="")
        print(printable(shell_command(["launch", "chat", folder])))
    return code


def _print_adapter(saved: SavedCheckpoint, folder: str) -> None:
    """Say what a folder of an adapter is for."""
    run = short_path(saved.folder.parent.parent)
    print(printable(f"exported the adapter of step {saved.manifest.step} of {run} to {folder}"))
    print(printable(f"use it on {saved.manifest.base}: PeftModel.from_pretrained(model, {folder!r}), or "), end="")
    print(printable(f"model.adapter={folder}; merge=true writes a whole model"))


def _snapshot_to_merge(saved: SavedCheckpoint) -> list[str]:
    """Return the run.yaml that says which weights a checkpoint's adapter belongs to.

    Raises:
        ConfigError: the checkpoint holds no adapter, or its run is gone or has other weights by now.
    """
    if not saved.manifest.adapter:
        why = f"{saved.folder} holds all weights of a model, and no adapter to merge"
        raise ConfigError("merge", "true", why=why, fix="leave it out")
    snapshot = RunDir(saved.folder.parent.parent).snapshot
    if not snapshot.is_file():
        why = f"{saved.folder} is not in its run, whose run.yaml names the weights to merge into"
        fix = "export without merge, and merge with PEFT: PeftModel.from_pretrained(…).merge_and_unload()"
        raise ConfigError("merge", "true", why=why, fix=fix)
    run = load_run(snapshot)
    if (gone := missing_base(run.model)) is not None:
        why = f"{saved.folder} holds an adapter of the weights in {gone}, which is not there"
        fix = "put it back; or leave merge out, and merge with PEFT: PeftModel.from_pretrained(…).merge_and_unload()"
        raise ConfigError("merge", "true", why=why, fix=fix)
    errors = list(run.model.validate_machine())
    if errors:
        raise ConfigErrors(errors)
    base = base_weights(run.model, seed=run.job.seed)
    if saved.manifest.base is not None and not is_same_base(saved.manifest.base, base):
        why = f"{saved.folder} holds an adapter of {saved.manifest.base}, and these weights are now {base}"
        raise ConfigError("merge", "true", why=why, fix="put back the weights that it was trained on")
    return [str(snapshot)]


def _options(words: Sequence[str]) -> ExportOptions:
    """Return the options of the verb.

    Raises:
        ConfigErrors: one is unknown or has a wrong value.
    """
    tree: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            why = "is neither RUN, DIR nor option=value"
            raise ConfigError(word, why=why, fix="write launch export RUN DIR dtype=bf16")
        tree[name] = _BOOLEANS.get(value, value)
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
    folder = target.parent.resolve()
    if folder.name == "checkpoints" and RunDir(folder.parent).snapshot.is_file():
        why = "is among the checkpoints of a run, which would take it for a damaged one"
        raise ConfigError("DIR", target, why=why, fix="name a folder outside of it")


def _checkpoint(word: str, root: Path, *, locks: CheckpointLocks) -> SavedCheckpoint:
    """Return the verified checkpoint to export, which ``locks`` keep.

    Raises:
        ConfigError: ``word`` leads to none.
    """
    folder = find_run_or_checkpoint(word, root, option="run")
    if folder is None:
        fix = "name a run that launch runs lists, or a folder checkpoints/step_…"
        raise ConfigError("run", word, why="is neither a run nor a checkpoint", fix=fix)
    if (quantized := quantized_model(folder)) is not None:
        why = f"is a run of job=quantize or job=sparsify, whose weights are files already: {quantized}"
        raise ConfigError("run", word, why=why, fix="copy that folder, or export the run whose weights it took")
    return find_intact_checkpoint(folder, word, option="run", locks=locks)
