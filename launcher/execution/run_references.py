"""Resolve runs that options name to the folders of checkpoints.

The options are ``model.weights``, ``model.adapter``, ``job.adapters`` and ``checkpoint.resume``.

A user names a run by its id or folder, or one checkpoint of it: ``RUN`` (the newest), ``RUN@best`` (the lowest held-out
loss), ``RUN@step_00000010``, or the folder ``RUN/checkpoints/step_00000010``. The parent resolves it, verifies it and
puts the checkpoint's ``model/`` into the run: ranks find the weights, whatever strategy wrote them, beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from launcher.checkpoint.adapter_base import adapter_from_tree, base_weights, is_same_base, missing_base
from launcher.checkpoint.foreign.plan import foreign_to_resume
from launcher.checkpoint.locks import CheckpointLocks
from launcher.checkpoint.manifest import adapter_manifest
from launcher.checkpoint.resume import find_checkpoint, parse_reference
from launcher.checkpoint.store import SavedCheckpoint, silent
from launcher.config.adapter import ALL_LINEAR, Qlora, shortest_targets
from launcher.config.adapter_folder import (
    AdapterUse,
    is_adapter_folder,
    read_adapter_folder,
    validate_adapter_fits,
)
from launcher.config.compose import Composition, compose, unused_vocab_size
from launcher.config.data.base import CHECKPOINT_TOKENIZER, Corpus, Synthetic
from launcher.config.job.generating import GeneratingJob
from launcher.config.model.base import Model, has_tokenizer
from launcher.config.model.hf import Hf
from launcher.config.model.linear_layers import module_sizes
from launcher.config.option_text import component_text, quoted_word
from launcher.config.plugins import used_plugins
from launcher.config.run import BatchedJob, Run, default_run_name
from launcher.config.snapshot import load_run, read_snapshot
from launcher.errors import ConfigError, ConfigErrors
from launcher.execution.gguf_folders import gguf_folder, names_gguf
from launcher.execution.saved_models import find_model_folder, find_run_or_checkpoint, select_checkpoints
from launcher.protocol.rundir import RunDir
from launcher.protocol.state_files import MODEL_FOLDER
from launcher.utils.hub import cached_folder
from launcher.utils.schema import to_tree

WEIGHTS, ADAPTER, RESUME = "model.weights", "model.adapter", "checkpoint.resume"
_KEPT = ("weights", "quantization", "adapter")
"""Options of the group model that do not choose the model."""


def resolve_run_references(composed: Composition, *, locks: CheckpointLocks | None = None) -> Run:
    """Return the composed run with each reference to a run replaced by a checkpoint's folder.

    The model is that of the run which wrote the weights, unless the command line or an experiment chooses one: then
    the two must be equal. The tokenizer of the data is the checkpoint's, if it has one.

    Args:
        composed: the run as the user typed it.
        locks: keep the checkpoints that are chosen.

    Raises:
        ConfigError: a reference leads to no checkpoint, an ambiguous one, or one that is damaged.
    """
    run = _with_folders(composed, locks or CheckpointLocks())
    run = _with_base_folder(_with_checkpoint_tokenizer(run, composed))
    return replace(run, plugins=used_plugins(run))  # the model may be a plugin's


def _with_base_folder(run: Run) -> Run:
    """Return a run of an adapter with the whole paths of its model's folders.

    Who loads the adapter later, from another folder, would take ``model`` for a name on the hub.
    """
    model = run.model
    if run.lora is None or not run.backend.shares_paths:
        return run
    if isinstance(model, Hf) and model.is_local:
        model = replace(model, name=str(Path(model.name).expanduser().absolute()))
    if model.weights not in ("random", "pretrained"):
        model = replace(model, weights=str(Path(model.weights).expanduser().absolute()))
    return replace(run, model=model)


def _with_folders(composed: Composition, locks: CheckpointLocks) -> Run:
    run = composed.run
    if run.checkpoint.resume not in ("none", "auto") and run.job.resumes:
        run = replace(run, checkpoint=replace(run.checkpoint, resume=str(_resumed(run))))
        run = _with_resumed_adapter(run, composed)
    run = _with_weights(run, composed, locks)
    return _with_served_adapters(_with_adapter(run, composed, locks), locks)


def _with_weights(run: Run, composed: Composition, locks: CheckpointLocks) -> Run:
    """Return ``run`` with ``model.weights`` as a folder, and the model of those weights."""
    if run.model.weights in ("random", "pretrained"):
        return run
    if names_gguf(run.model.weights):
        run = replace(run, model=replace(run.model, weights=str(gguf_folder(run))))
        return _with_model_folder(run, composed)
    folder = _run_or_checkpoint(run.model.weights, run, option=WEIGHTS)
    if folder is None:
        return _with_model_folder(run, composed)
    weights = find_model_folder(folder, run.model.weights, option=WEIGHTS, locks=locks)
    if is_adapter_folder(weights):
        run = replace(run, model=_base_of(weights, composed))
    else:
        run = replace(run, model=_model_of(weights, composed))
    run = _named_after_model(run, composed)
    if run.model.adapter is None:
        run = replace(run, model=_self_contained(run.model, weights))
    return _with_tokenizer_of(weights, run, composed)


def _with_model_folder(run: Run, composed: Composition) -> Run:
    """Return ``run`` with the model that a folder of weights describes, unless one is chosen."""
    folder = Path(run.model.weights).expanduser()
    if not run.backend.shares_paths or _is_chosen(composed) or not (folder / "config.json").is_file():
        return run
    kept = {name: getattr(run.model, name) for name in _KEPT[1:]}
    run = _named_after_model(replace(run, model=Hf(name=run.model.weights, **kept)), composed)
    return _with_tokenizer_of(folder, run, composed)


def _named_after_model(run: Run, composed: Composition) -> Run:
    """Return ``run`` named after its model, unless it has a name of its own."""
    is_default = run.run.name == default_run_name(composed.run.model.name)
    if not is_default or "run.name" in _keys(composed.overrides):
        return run
    return replace(run, run=replace(run.run, name=default_run_name(run.model.name)))


def _with_tokenizer_of(weights: Path, run: Run, composed: Composition) -> Run:
    """Return ``run`` with the tokenizer in the folder of its weights, unless it has another one."""
    if isinstance(run.data, Corpus) and (weights / "tokenizer.json").is_file() and _uses_default_tokenizer(composed):
        return replace(run, data=_given_tokenizer(run.data, "model", composed))
    return run


def _with_checkpoint_tokenizer(run: Run, composed: Composition) -> Run:
    """Return ``run`` with the tokenizer of the checkpoint that it resumes from.

    Unchanged when the same data gives the same tokenizer.

    The weights were trained with the token ids of that tokenizer, and a BPE trained on other text has other ids.
    """
    data, resume = run.data, run.checkpoint.resume
    _check_tokens(run)
    if not isinstance(data, Corpus):
        return run
    if run.job.resumes and run.backend.shares_paths and _uses_default_tokenizer(composed):
        foreign = _foreign_tokenizer(resume)
        if foreign is not None:
            return replace(run, data=_given_tokenizer(data, str(foreign), composed))
    if data.tokenizer == CHECKPOINT_TOKENIZER and not (run.job.resumes and resume != "none"):
        why = "the run does not resume from a checkpoint"
        raise ConfigError("data.tokenizer", data.tokenizer, why=why, fix="set checkpoint.resume=RUN, or leave it out")
    if not run.job.resumes or not _uses_default_tokenizer(composed) or not data.trains_tokenizer:
        return run
    if resume == "none" or (resume == "auto" and run.run.dir is None):
        return run
    if not run.backend.shares_paths:  # this machine cannot compare the data; a sized vocabulary is one that is trained
        is_blind = resume == "auto" or "data.vocab_size" in _keys(composed.overrides)
        return run if is_blind else replace(run, data=_given_tokenizer(data, CHECKPOINT_TOKENIZER, composed))
    try:
        saved = find_checkpoint(resume, RunDir(Path(run.run.dir or ".")), say=silent)
        if saved is None or not (saved.folder / MODEL_FOLDER / "tokenizer.json").is_file():
            return run
        if to_tree(data) == read_snapshot(RunDir(saved.folder.parent.parent).snapshot).get("data"):
            return run
    except ConfigError as error:
        if error.option != "run.yaml":
            return run  # validate_machine reports it
    return replace(run, data=_given_tokenizer(data, CHECKPOINT_TOKENIZER, composed))


def _foreign_tokenizer(resume: str) -> Path | None:
    """Return the folder of the tokenizer of another program's checkpoint, if it has one."""
    try:
        foreign = foreign_to_resume(resume)
    except ConfigError:
        return None  # validate_machine reports it
    return foreign.folder if foreign is not None and has_tokenizer(foreign.folder) else None


def _check_tokens(run: Run) -> None:
    """Raise if text meets a checkpoint of synthetic tokens, or the reverse.

    The token ids have no common meaning.
    """
    resume = run.checkpoint.resume
    if not run.job.resumes or resume == "none" or not run.backend.shares_paths:
        return
    if resume == "auto" and run.run.dir is None:
        return
    try:
        saved = find_checkpoint(resume, RunDir(Path(run.run.dir or ".")), say=silent)
    except ConfigError:
        return  # validate_machine reports it
    if saved is None:
        return
    trained_on = _data_kind_of(saved)
    if trained_on not in (None, Synthetic.kind) and not isinstance(run.data, Corpus):
        why = f"{saved.folder} was trained on text, and its weights need the token ids of its tokenizer"
        raise ConfigError("data", run.data.kind, why=why, fix="set data=text, or checkpoint.resume=none to start over")
    if trained_on == Synthetic.kind and isinstance(run.data, Corpus):
        why = f"{saved.folder} was trained on data=synthetic, whose tokens are not text"
        fix = "set data=synthetic, or checkpoint.resume=none to start over"
        raise ConfigError("data", run.data.kind, why=why, fix=fix)


def _data_kind_of(saved: SavedCheckpoint) -> str | None:
    """Return the kind of data that a checkpoint was trained on; ``None`` where nothing says so."""
    try:
        data = read_snapshot(RunDir(saved.folder.parent.parent).snapshot).get("data")
    except ConfigError:
        data = None
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind is None and (saved.folder / MODEL_FOLDER / "tokenizer.json").is_file():
        return "text"
    return None if kind is None else str(kind)


def _given_tokenizer(data: Corpus, tokenizer: str, composed: Composition) -> Corpus:
    """Return ``data`` with a tokenizer that is not trained on it.

    Raises:
        ConfigError: a vocabulary size is set, which is an option of a BPE trained by this run only.
    """
    if "data.vocab_size" in _keys(composed.overrides):
        raise unused_vocab_size(replace(data, tokenizer=tokenizer))
    return replace(data, tokenizer=tokenizer, vocab_size=Corpus.vocab_size)  # the size is that of a BPE


def _resumed(run: Run) -> Path:
    """Return the folder of the run or checkpoint that ``checkpoint.resume`` names."""
    word, reference = run.checkpoint.resume, parse_reference(run.checkpoint.resume)
    folder = _run_or_checkpoint(word, run, option=RESUME)
    if folder is None:
        return Path(word).expanduser().absolute()  # another program's, or validate_machine reports it
    if reference.selector is None:
        return folder
    return next(select_checkpoints(folder, word, option=RESUME)).folder


def _run_or_checkpoint(word: str, run: Run, *, option: str) -> Path | None:
    """Return the folder of a run or checkpoint named without ``@…``; ``None`` if it is neither.

    Raises:
        ConfigError: it is no folder, and no run, or more than one, begins like it.
    """
    if not run.backend.shares_paths:
        reference = parse_reference(word)
        if Path(reference.source).expanduser().is_absolute() and reference.selector is None:
            return None
        why = f"backend={run.backend.kind} runs where this machine's runs are not visible"
        where = {RESUME: "the folder of a checkpoint", WEIGHTS: "the folder step_…/model"}
        fix = f"give {where.get(option, 'the folder of the adapter')} as an absolute path on its hosts"
        raise ConfigError(option, word, why=why, fix=fix)
    return find_run_or_checkpoint(word, Path(run.run.root), option=option)


def _with_adapter(run: Run, composed: Composition, locks: CheckpointLocks) -> Run:
    """Return ``run`` with ``model.adapter`` as a folder, and as the adapter to train.

    Raises:
        ConfigError: it is of other weights, or options of the group adapter contradict it.
    """
    if run.model.adapter is None:
        return run
    word = run.model.adapter
    folder = _adapter_in(word, run, locks, option=ADAPTER)
    run = replace(run, model=replace(run.model, adapter=folder))
    trains = isinstance(run.job, BatchedJob) and run.job.trains
    if not run.backend.shares_paths:
        if trains:
            why = f"backend={run.backend.kind} runs on machines whose files this one cannot read"
            raise ConfigError(ADAPTER, word, why=why, fix="continue it there by checkpoint.resume")
        return run
    found = read_adapter_folder(ADAPTER, str(run.model.adapter), use=AdapterUse.MODEL)
    if run.model.weights == "random":
        why = "belongs to the weights that it was trained on, and the run has random ones"
        raise ConfigError(ADAPTER, found.folder, why=why, fix="set model.weights to them")
    _check_base(ADAPTER, found.folder, run)
    modules = module_sizes(run.model)
    if modules is not None:
        for error in validate_adapter_fits(ADAPTER, found, modules.linear, model=run.model.name):
            raise error
    if not trains:
        return run
    linear = list(found.layers if modules is None else modules.linear)
    lora = replace(found.lora, targets=shortest_targets(list(found.layers), linear) if modules else found.lora.targets)
    if modules is not None and sorted(found.layers) == sorted(linear):
        lora = replace(lora, targets=ALL_LINEAR)
    if typed := sorted(key for key in _keys(composed.overrides) if key.startswith("adapter.")):
        why = f"model.adapter={word} is continued as it is: {component_text(lora)}"
        raise ConfigError(typed[0], why=why, fix=f"leave {typed[0]} out")
    if run.lora is not None and (run.lora.is_dora, run.lora.is_rslora) != (lora.is_dora, lora.is_rslora):
        fix = f"set adapter={lora.kind}, or leave it out"
        raise ConfigError("adapter", run.lora.kind, why=f"model.adapter={word} is {lora.kind}", fix=fix)
    if run.lora is not None and run.lora.kind == Qlora.kind:
        lora = Qlora(**{field.name: getattr(lora, field.name) for field in fields(lora)})
    return replace(run, adapter=lora)


def _with_served_adapters(run: Run, locks: CheckpointLocks) -> Run:
    """Return ``run`` with each of ``job.adapters`` as a folder.

    Raises:
        ConfigErrors: one is of a run that trained no adapter, or of other weights than those of this run.
    """
    if not isinstance(run.job, GeneratingJob) or not run.job.adapters:
        return run
    found, errors = {}, []
    for name, word in run.job.adapters.items():
        option = f"job.adapters.{name}"
        try:
            found[name] = _adapter_in(word, run, locks, option=option)
            if run.backend.shares_paths:
                _check_base(option, Path(found[name]).expanduser(), run)
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise ConfigErrors(errors)
    return replace(run, job=replace(run.job, adapters=found))


def _adapter_in(word: str, run: Run, locks: CheckpointLocks, *, option: str) -> str:
    """Return the folder of the adapter that a run, a checkpoint or a folder names.

    Raises:
        ConfigError: it is a run or a checkpoint without one.
    """
    folder = _run_or_checkpoint(word, run, option=option)
    if folder is None:
        return word  # a folder of PEFT's, which is read later
    folder = find_model_folder(folder, word, option=option, locks=locks)
    if not is_adapter_folder(folder):
        why = "is of a run that trained all weights of a model"
        raise ConfigError(option, word, why=why, fix=f"set model.weights={word} instead of {option}")
    return str(folder)


def _check_base(option: str, folder: Path, run: Run) -> None:
    """Raise if a checkpoint's adapter was trained on other weights than those of the run.

    Raises:
        ConfigError: naming both.
    """
    manifest = adapter_manifest(folder)
    base = base_weights(run.model, seed=run.job.seed)
    if manifest is not None and manifest.base is not None and not is_same_base(manifest.base, base):
        why = f"is an adapter of {manifest.base}, this run's weights are {base}"
        raise ConfigError(option, folder, why=why, fix="choose the model and weights that it was trained on")


def _base_of(folder: Path, composed: Composition) -> Model:
    """Return the model of the run that trained an adapter, with the adapter on it.

    Raises:
        ConfigError: the run is gone, or another model is chosen.
    """
    given, saved = composed.run.model, _model_of_run(folder)
    if saved is None:
        why = f"{folder} holds an adapter, and its run's run.yaml, which names the model, is gone"
        fix = f"set model to the one that it was trained on, and model.adapter={folder}"
        raise ConfigError(WEIGHTS, given.weights, why=why, fix=fix)
    if (gone := missing_base(saved)) is not None:
        why = f"holds an adapter of the weights in {gone}, which is not there"
        base = "model=hf model.name=FOLDER" if isinstance(saved, Hf) else "model.weights=FOLDER"
        fix = f"if it has moved, set {base} {quoted_word(ADAPTER, given.weights)}"
        raise ConfigError(WEIGHTS, given.weights, why=why, fix=fix)
    if _is_chosen(composed) and saved.architecture() != given.architecture():
        why = f"is an adapter of another model: {_differences(saved, given)}"
        fix = f"leave the model out to use that of the run ({default_run_name(saved.name)})"
        raise ConfigError(WEIGHTS, given.weights, why=why, fix=fix)
    quantization = given.quantization if "model.quantization" in _keys(composed.overrides) else saved.quantization
    return replace(saved, adapter=str(folder), quantization=quantization)


def _with_resumed_adapter(run: Run, composed: Composition) -> Run:
    """Return ``run`` with the adapter of the checkpoint it resumes from, unless one is chosen."""
    chosen = {key.partition(".")[0] for key in _keys(composed.overrides)}
    if not run.backend.shares_paths or "adapter" in chosen or run.lora is not None:
        return run
    try:
        saved = find_checkpoint(run.checkpoint.resume, RunDir(Path(run.run.dir or ".")), say=silent)
    except ConfigError:
        return run  # validate_machine reports it
    lora = None if saved is None else adapter_from_tree(saved.manifest.adapter)
    return run if lora is None else replace(run, adapter=lora)


def _model_of(weights: Path, composed: Composition) -> Model:
    """Return the model to load ``weights`` into.

    It is the model of their run, or the chosen one, which must be equal to it.

    Weights without a run.yaml describe their model in ``config.json``.

    Raises:
        ConfigError: they are of another model than the one chosen.
    """
    configured = replace(composed.run.model, weights=str(weights))  # they may hold a head that the config ties
    saved = _model_of_run(weights) or Hf(name=str(weights))
    is_equal = saved.architecture() == configured.architecture()
    if _is_chosen(composed) and not is_equal:
        fix = f"leave the model out to use that of the run ({default_run_name(saved.name)})"
        why = f"is of another model: {_differences(saved, configured)}"
        raise ConfigError(WEIGHTS, composed.run.model.weights, why=why, fix=fix)
    if is_equal and (_is_chosen(composed) or isinstance(saved, Hf)):
        return configured
    return replace(saved, weights=str(weights), **{name: getattr(configured, name) for name in _KEPT[1:]})


def _self_contained(model: Model, weights: Path) -> Model:
    """Return ``model`` built from ``weights`` alone if its own folder or hub model is not here."""
    if not isinstance(model, Hf) or Path(model.name).is_dir() or cached_folder(model.name) is not None:
        return model
    return replace(model, name=str(weights), weights="pretrained")


def _model_of_run(weights: Path) -> Model | None:
    """Return the model in the run.yaml around ``weights``, if there is one of this version."""
    for folder in (weights.parent.parent.parent, weights.parent):
        snapshot = RunDir(folder).snapshot
        if snapshot.is_file():
            try:
                return load_run(snapshot).model
            except ConfigError as error:
                _warn(f"{snapshot} cannot be read, so the model is that of {weights / 'config.json'}: {error}")
                return None
    return None


def _differences(saved: Model, configured: Model) -> str:
    wanted, given = saved.architecture(), configured.architecture()
    if wanted.get("family") != given.get("family"):
        return f"its family is {wanted.get('family')}, this run's is {given.get('family')}"
    names = [name for name in sorted(wanted.keys() | given.keys()) if wanted.get(name) != given.get(name)]
    return ", ".join(f"its {name} is {wanted.get(name)}, this run's is {given.get(name)}" for name in names)


def _is_chosen(composed: Composition) -> bool:
    """Whether the command line or an experiment chooses the model."""
    keys = _keys(composed.overrides)
    options = {key.partition(".")[2] for key in keys if key.startswith("model.")}
    if "model" in keys or options - set(_KEPT):
        return True
    if "exp" not in keys:
        return False
    usual = compose(()).run.model
    return replace(composed.run.model, **{name: getattr(usual, name) for name in _KEPT}) != usual


def _uses_default_tokenizer(composed: Composition) -> bool:
    data = composed.run.data
    return isinstance(data, Corpus) and data.trains_tokenizer and "data.tokenizer" not in _keys(composed.overrides)


def _keys(words: Sequence[str]) -> set[str]:
    return {word.lstrip("+").partition("=")[0].partition("@")[0] for word in words}


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
