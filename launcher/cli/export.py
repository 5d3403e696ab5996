"""``launch export``: a model's weights and tokenizer as files that other programs load."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.checkpoint.adapter_base import base_weights, is_same_base, missing_base
from launcher.checkpoint.locks import CheckpointLocks
from launcher.checkpoint.resume import is_checkpoint
from launcher.checkpoint.store import SavedCheckpoint
from launcher.cli.arguments import Arguments, path_value
from launcher.config.export import GGUF, ONNX, OPENVINO, SAFETENSORS, ExportOptions
from launcher.config.model.base import has_tokenizer
from launcher.config.model.folder import read_config
from launcher.config.model.hf import is_model_folder
from launcher.config.model.image_text import read_image_text
from launcher.config.quantization import MANIFEST_FILE as QUANTIZATION_FILE
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


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is exported."""

    folder: Path
    """Config and tokenizer; the weights are in it or beside it."""
    title: str
    """What it is, for the user."""
    saved: SavedCheckpoint | None = None
    """The checkpoint whose model it is; ``None`` for a model folder."""


def run(arguments: Arguments) -> int:
    """Find the weights, and write them in a process with torch."""
    options = _options(arguments.settings)
    target = path_value("DIR")(arguments.folder).absolute()
    _check_target(target, options)
    with CheckpointLocks() as locks:
        source = _source(arguments.source, arguments.root, options, locks=locks)
        saved = source.saved
        merged = _snapshot_to_merge(source) if options.merge else []
        if options.format != SAFETENSORS:
            _check_exportable(source, options)
        command = [sys.executable, "-m", "launcher.jobs.export", str(source.folder), str(target)]
        code = run_in_foreground([*command, json.dumps(asdict(options)), *merged])
    if code == 0:
        path = short_path(target)
        if saved is not None and saved.manifest.adapter and not options.merge:
            _print_adapter(saved, path)
            return code
        print(printable(f"exported {source.title} to {path}"))
        print(printable(_use(path, options)))
    return code


def _use(path: str, options: ExportOptions) -> str:
    """Return the line that says what loads the file or folder."""
    if options.format == GGUF:
        use = shell_command([f"model.weights={path}"])
        return f"use it: {shell_command(['llama-cli', '-m', path])}, or {use}"
    if options.format == ONNX:
        return f"use it: onnxruntime_genai.Model({path!r})"
    if options.format == OPENVINO:
        return f"use it: openvino_genai.LLMPipeline({path!r}, 'CPU')"
    if read_image_text(Path(path)) is not None:
        served = shell_command(["launch", "job=serve", "model=hf", f"model.name={path}"])
        return f"use it: AutoModelForImageTextToText and AutoProcessor.from_pretrained({path!r}), or {served}"
    return f"use it: AutoModelForCausalLM.from_pretrained({path!r}), or {shell_command(['launch', 'chat', path])}"


def _check_exportable(source: _Source, options: ExportOptions) -> None:
    """Raise if the format has no place for this model, before any work begins.

    Raises:
        ConfigErrors: the exporter lacks its architecture, or it has no tokenizer.
    """
    saved = source.saved
    if saved is not None and saved.manifest.adapter and not options.merge:
        why = f"{saved.folder} holds an adapter alone"
        raise ConfigError("format", options.format, why=why, fix="add merge=true to write the whole model")
    try:
        config = read_config(source.folder)
    except (OSError, ValueError) as error:
        raise ConfigError("run", str(source.folder), why=str(error), fix="name a model folder or a run") from error
    errors = [*options.validate_model(config), *options.validate_machine()]
    if not has_tokenizer(source.folder):
        why = f"{source.folder} holds no tokenizer, which the file needs"
        errors.append(ConfigError("format", options.format, why=why, fix="export a model that was trained on text"))
    if errors:
        raise ConfigErrors(errors)


def _print_adapter(saved: SavedCheckpoint, folder: str) -> None:
    """Say what a folder of an adapter is for."""
    run = short_path(saved.folder.parent.parent)
    print(printable(f"exported the adapter of step {saved.manifest.step} of {run} to {folder}"))
    print(printable(f"use it on {saved.manifest.base}: PeftModel.from_pretrained(model, {folder!r}), or "), end="")
    print(printable(f"model.adapter={folder}; merge=true writes a whole model"))


def _snapshot_to_merge(source: _Source) -> list[str]:
    """Return the run.yaml that says which weights a checkpoint's adapter belongs to.

    Raises:
        ConfigError: the checkpoint holds no adapter, or its run is gone or has other weights by now.
    """
    saved = source.saved
    if saved is None or not saved.manifest.adapter:
        why = (
            f"{source.folder if saved is None else saved.folder} holds all weights of a model, and no adapter to merge"
        )
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


def _check_target(target: Path, options: ExportOptions) -> None:
    if target.exists() or target.is_symlink():
        raise ConfigError("DIR", target, why="is there already", fix="name a folder that does not exist, or remove it")
    if not target.parent.is_dir():
        raise ConfigError("DIR", target, why=f"there is no folder {target.parent}", fix="create it, or choose another")
    if options.format == GGUF and target.suffix != ".gguf":
        fix = f"name it {target.name}.gguf"
        raise ConfigError("DIR", target, why="format=gguf writes one file, whose name ends in .gguf", fix=fix)
    folder = target.parent.resolve()
    if folder.name == "checkpoints" and RunDir(folder.parent).snapshot.is_file():
        why = "is among the checkpoints of a run, which would take it for a damaged one"
        raise ConfigError("DIR", target, why=why, fix="name a folder outside of it")


def _source(word: str, root: Path, options: ExportOptions, *, locks: CheckpointLocks) -> _Source:
    """Return what to export: a verified checkpoint, which ``locks`` keep, or a model folder.

    Raises:
        ConfigError: ``word`` leads to none.
    """
    path = Path(word).expanduser()
    if is_model_folder(path) and not is_checkpoint(path.absolute().parent):
        if options.format != SAFETENSORS or not (path / QUANTIZATION_FILE).is_file():
            return _Source(folder=path.absolute(), title=short_path(path.absolute()))
        raise _is_quantized(word, path)
    folder = find_run_or_checkpoint(word, root, option="run")
    if folder is None:
        fix = "name a run that launch runs lists, a folder checkpoints/step_…, or a model folder"
        raise ConfigError("run", word, why="is neither a run nor a checkpoint", fix=fix)
    if (quantized := quantized_model(folder)) is not None:
        if options.format == SAFETENSORS:
            raise _is_quantized(word, quantized)
        return _Source(folder=quantized, title=short_path(quantized))
    saved = find_intact_checkpoint(folder, word, option="run", locks=locks)
    title = f"step {saved.manifest.step} of {short_path(saved.folder.parent.parent)}"
    return _Source(folder=saved.folder / MODEL_FOLDER, title=title, saved=saved)


def _is_quantized(word: str, folder: Path) -> ConfigError:
    why = f"is a run of job=quantize or job=sparsify, whose weights are files already: {folder}"
    fix = "copy that folder, export the run whose weights it took, or write format=gguf"
    return ConfigError("run", word, why=why, fix=fix)
