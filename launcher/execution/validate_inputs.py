"""Checks of model, tokenizers and data that ranks load from this machine or from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.checkpoint.manifest import UnsupportedManifest, model_folder_damage
from launcher.checkpoint.resume import find_checkpoint
from launcher.checkpoint.store import SavedCheckpoint, silent
from launcher.config.data.auto import AutoData
from launcher.config.data.base import CHECKPOINT_TOKENIZER, Corpus, Data
from launcher.config.data.bpe import count_folder_tokens, folder_tokenizer, folder_vocabulary, trained_vocabulary
from launcher.config.data.hf import HfData
from launcher.config.data.padding import estimate_padding
from launcher.config.data.sources import cached_dataset
from launcher.config.job.compression import CompressionJob
from launcher.config.job.eval_sets import EvaluatingJob
from launcher.config.job.generating import GeneratingJob
from launcher.config.model.base import (
    FOLDER_WITH_TOKENIZER,
    Model,
    has_tokenizer,
    tokenizer_alternative,
    validate_tokenizer_folder,
)
from launcher.config.model.hf import Hf
from launcher.config.run import BatchedJob, Benchmark, Job, Run
from launcher.config.supported_models import packing_error
from launcher.errors import ConfigError
from launcher.protocol.plan import Host, Work
from launcher.protocol.rundir import RunDir
from launcher.utils.hub import cached_folder, validate_dataset_fetch, validate_hub_fetch, validate_hub_name
from launcher.utils.text import counted

_COMPARED_CHARS = 1 << 20
"""A BPE of so much text is trained in a second, to compare it with that of a checkpoint."""


def validate_inputs(run: Run, run_dir: RunDir, *, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """Yield errors of the files and hub names that ranks will load, one for each cause."""
    fetches_here = not any(host.ssh_destination or not host.is_probed for host in hosts)
    benchmark = run.benchmark if isinstance(run.benchmark, Benchmark) else None
    uses_model = isinstance(run.job, BatchedJob | GeneratingJob) and _loads_model(run.job)
    of_model = list(run.model.validate_machine()) if uses_model else []
    if not of_model and fetches_here and (uses_model or (benchmark and benchmark.needs_model)):
        of_model += _validate_hub_model(run.model)
    yield from of_model
    of_data = list(_validate_data(run, run.data, fetches_here=fetches_here)) if _reads_data(run) else []
    yield from of_data
    if benchmark and benchmark.needs_data and fetches_here:
        yield from _validate_hub_data(run.data)  # the job looks at local files
    of_tokenizers: list[ConfigError] = []
    for option, choice in _tokenizers_of(run):
        if not (of_model and _is_of_model(choice, run.model)):
            of_tokenizers += _validate_tokenizer(run, option, choice, fetches_here=fetches_here)
    yield from of_tokenizers
    if not of_model and not of_tokenizers:
        yield from _validate_lengths(run, run_dir, can_read_data=not of_data)
    yield from _validate_model_folders(run)


def _validate_hub_model(model: Model) -> Iterator[ConfigError]:
    """Yield weights, or the config of an untrained model, that cannot be downloaded."""
    source = model.pretrained_source() if model.weights == "pretrained" else None
    pattern = "*.safetensors"
    if isinstance(model, Hf) and model.weights == "random":
        source, pattern = model.pretrained_source(), "config.json"
    if not isinstance(source, str):
        return
    option, value, instead = "model.weights", model.weights, "set model.weights=random"
    if isinstance(model, Hf):
        option, value, instead = "model.name", source, "choose a model that is here (model=smollm2_135m)"
    yield from validate_hub_fetch(option, value, name=source, pattern=pattern, instead=instead)


def _reads_data(run: Run) -> bool:
    return isinstance(run.job, BatchedJob) or (isinstance(run.job, GeneratingJob) and run.job.reads_data)


def _validate_data(run: Run, data: Data, *, fetches_here: bool) -> Iterator[ConfigError]:
    errors = list(data.validate_machine())
    yield from errors
    if not errors and isinstance(data, AutoData) and isinstance(run.job, BatchedJob):
        yield from run.job.validate_shapes(run, data, data.local_shapes())
    if not errors and fetches_here:
        yield from _validate_hub_data(data)


def _validate_hub_data(data: Data) -> Iterator[ConfigError]:
    """Yield a hub data set that cannot be downloaded.

    One whose tokens are cached needs no hub.
    """
    if isinstance(data, HfData) and data.is_on_hub and not data.has_cached_tokens:
        yield from validate_dataset_fetch("data.path", data.path)
    if isinstance(data, AutoData):
        for option, name in data.hub_names():
            if cached_dataset(name) is None:
                yield from validate_dataset_fetch(option, name)


def _is_of_model(choice: str, model: Model) -> bool:
    return choice in ("model", model.name)


def _validate_tokenizer(run: Run, option: str, choice: str, *, fetches_here: bool) -> Iterator[ConfigError]:
    """Yield a tokenizer that ranks would load and that is missing or cannot be downloaded."""
    takes_own_tokens_only = isinstance(run.job, CompressionJob) and option == "data.tokenizer"
    alternative = None if takes_own_tokens_only else tokenizer_alternative(option)
    instead = f"set {alternative or f'{option}={FOLDER_WITH_TOKENIZER}'}"
    try:
        source = _tokenizer_source(run.model, choice)
    except ConfigError as error:
        yield ConfigError(option, choice, why=error.why, fix=instead)
        return
    if isinstance(source, Path):
        if source.is_dir():  # a model's folder that is not there is refused where it is named
            shape = run.model.shape() if _computes(run.job) else None
            num_rows = None if shape is None else shape.vocab_size
            yield from validate_tokenizer_folder(option, choice, source, num_rows=num_rows, alternative=alternative)
        return
    problem = None
    if choice != "model":
        takes_names = option == "data.tokenizer"
        problem = validate_hub_name(
            option, choice, holds="a tokenizer", is_such=has_tokenizer, instead=instead, takes_names=takes_names
        )
    if problem is not None:
        yield problem
    elif source is not None and fetches_here:
        yield from validate_hub_fetch(option, choice, name=source, pattern="*token*", instead=instead)


def _tokenizer_source(model: Model, choice: str) -> Path | str | None:
    """Return the folder or hub name of a tokenizer; ``None`` if a rank creates the folder.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    if choice == "model":
        return model.tokenizer_source()
    folder = Path(choice).expanduser()
    return folder if folder.is_dir() else choice


def local_tokenizer_folder(run: Run, run_dir: RunDir, choice: str) -> Path | None:
    """Return a tokenizer's local folder; ``None`` without one, or if a rank makes it."""
    try:
        if choice == CHECKPOINT_TOKENIZER:
            saved = find_checkpoint(run.checkpoint.resume, run_dir, say=silent)
            return None if saved is None else saved.folder / "model"
        source = _tokenizer_source(run.model, choice)
    except ConfigError:
        return None
    return cached_folder(source) if isinstance(source, str) else source


def data_details(run: Run, folder: Path, work: Work) -> dict[str, str]:
    """Return what the data of a run holds, for its plan.

    Args:
        run: of the plan.
        folder: its directory.
        work: of the plan.
    """
    if not isinstance(run.data, AutoData) or not _reads_data(run) or not run.backend.shares_paths:
        return {}
    own = None if run.data.trains_tokenizer else local_tokenizer_folder(run, RunDir(folder), run.data.tokenizer)
    details = dict(run.data.describe(own))
    if isinstance(run.job, EvaluatingJob):
        details |= dict(run.job.describe_shapes(run, run.data.local_shapes()))
    details |= _padding_details(run, run.data, own, work)
    return details


def _padding_details(run: Run, data: AutoData, own: Path | None, work: Work) -> dict[str, str]:
    """Return the share of a batch that would be padding, if the run's rows are not packed.

    Args:
        run: of the plan.
        data: of the run.
        own: folder of the tokenizer; ``None`` if it is trained on the data, or not here yet.
        work: of the plan.
    """
    shapes = data.local_shapes()
    if not isinstance(run.job, BatchedJob) or not run.job.trains or work.batch is None or not shapes:
        return {}
    packs = packing_error(run.model, run.attention) is None if data.packing is None else data.packing
    if not data.separates_sources(shapes) or (packs and "preference" not in shapes):
        return {}
    equal_shapes = run.parallel.needs_equal_shapes
    rows = f"all rows are padded to {run.job.sequence_length:,} tokens"
    if not equal_shapes:
        rows = f"rows are padded to the longest of {work.batch.micro_batch} of about one length"
    tokenizer = None if own is None else folder_tokenizer(own)
    if tokenizer is None or run.model.image_text() is not None:  # a rank counts the tokens of images
        return {"padding": f"{rows}; rank 0 prints the share when it has the tokenizer"}
    found = estimate_padding(
        data,
        tokenizer,
        template=data.plan_template(own),
        sequence_length=run.job.sequence_length,
        batch=work.batch,
        num_steps=work.num_steps,
        seed=run.job.seed,
        equal_shapes=equal_shapes,
    )
    if found is None:
        return {"padding": f"{rows}; rank 0 prints the share when it has the data"}
    about = "" if found.is_whole else f", by the first {counted(found.num_rows, 'row')} of the data"
    return {"padding": f"{found.share:.1%} of a batch{about}: {rows}"}


def validate_resumed_tokenizer(run: Run, saved: SavedCheckpoint) -> Iterator[ConfigError]:
    """Yield a tokenizer of the data that differs from the one of ``saved``.

    Tokenizers in folders on this machine are compared, and a BPE whose tokens are cached or whose text is short. Of the
    BPE of a longer text the plan knows no more than its largest size. Ranks compare the others.
    """
    data = run.data
    if not isinstance(data, Corpus) or data.tokenizer == CHECKPOINT_TOKENIZER:
        return
    known = folder_vocabulary(saved.folder / "model")
    if known is None:
        return
    if data.trains_tokenizer:
        own = _trained_vocabulary(data)
        differs = len(known) > data.vocab_size if own is None else own != known
    else:
        folder = local_tokenizer_folder(run, RunDir(saved.folder.parent.parent), data.tokenizer)
        own = None if folder is None else folder_vocabulary(folder)
        differs = own is not None and _contradict(own, known)
    if not differs:
        return
    why = f"{saved.folder}, which the run resumes from, was trained with another tokenizer"
    weights = f"model.weights={saved.folder} checkpoint.resume=none"
    fix = f"set data.tokenizer={CHECKPOINT_TOKENIZER}, or {weights} to start over with this tokenizer"
    yield ConfigError("data.tokenizer", data.tokenizer, why=why, fix=fix)


def _trained_vocabulary(data: Corpus) -> dict[str, int] | None:
    """Return the vocabulary of the BPE of a text; ``None`` if training it takes long."""
    try:
        cached = folder_vocabulary(data.token_cache(data.trained_tokenizer))
        pieces = data.small_pieces(_COMPARED_CHARS) if cached is None else None
    except (ConfigError, OSError):
        return None  # validate_inputs reports it
    if pieces is None:
        return cached
    return trained_vocabulary([piece.text for piece in pieces], vocab_size=data.vocab_size)


def _contradict(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Return whether two vocabularies really differ.

    Tokens that Transformers may add while loading do not count.
    """
    smaller, larger = sorted((one, other), key=len)
    return any(larger.get(token) != number for token, number in smaller.items())


def _validate_lengths(run: Run, run_dir: RunDir, *, can_read_data: bool) -> Iterator[ConfigError]:
    """Yield texts of the wrong length, if this machine has text and tokenizer.

    Ranks check the others.
    """
    if isinstance(run.job, BatchedJob) and isinstance(run.data, Corpus) and can_read_data:
        own = None if run.data.trains_tokenizer else local_tokenizer_folder(run, run_dir, run.data.tokenizer)
        yield from run.data.validate_length(run.job.sequence_length, tokenizer=own)
    if isinstance(run.job, CompressionJob) and run.job.tokenizer not in ("data", "bytes"):
        folder = local_tokenizer_folder(run, run_dir, run.job.tokenizer)
        prompt = None if folder is None else count_folder_tokens(folder, [run.job.prompt])
        shape, length = run.model.shape(), run.job.sample_tokens
        most = None if shape is None else shape.max_position_embeddings
        if prompt and most is not None and length < most < prompt + length:  # the plan refuses a longer sample
            room = f"{run.model.name} takes at most {most} with the {length} of job.sample_tokens"
            fix = f"set job.sample_tokens={most - prompt}" if prompt < most else "shorten it"
            yield ConfigError("job.prompt", why=f"has {prompt} tokens, and {room}", fix=fix)


def _validate_model_folders(run: Run) -> Iterator[ConfigError]:
    """Yield checkpoint folders whose files differ from their checksums.

    ``model.weights`` is left out: it has been resolved to an intact checkpoint.
    """
    named = [(option, choice, False) for option, choice in _tokenizers_of(run) if choice != "model"]
    if isinstance(run.model, Hf) and run.model.is_local:
        named.append(("model.name", run.model.name, run.model.weights == "pretrained"))
    for option, choice, weights in named:
        try:
            damage = model_folder_damage(Path(choice).expanduser(), weights=weights)
        except UnsupportedManifest as error:
            yield ConfigError(option, choice, why=str(error), fix=error.fix)
            continue
        if damage:
            fix = "name the folder of an intact checkpoint"
            yield ConfigError(option, choice, why=f"is of a damaged checkpoint: {damage}", fix=fix)


def _tokenizers_of(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the options that name a tokenizer for ranks to load, each with its value."""
    choice = getattr(run.job, "tokenizer", None)
    needs_data = isinstance(run.benchmark, Benchmark) and run.benchmark.needs_data
    uses_data = isinstance(run.job, BatchedJob) or choice == "data" or needs_data
    trained_here = ("auto", "bpe", CHECKPOINT_TOKENIZER)  # or saved where validate_resume looks
    if uses_data and isinstance(run.data, Corpus) and run.data.tokenizer not in trained_here:
        yield "data.tokenizer", run.data.tokenizer
    if choice not in (None, "data", "bytes"):
        yield "job.tokenizer", choice


def _loads_model(job: Job) -> bool:
    """Return whether a job needs files of its model: weights, or their tokenizer."""
    return _computes(job) or getattr(job, "tokenizer", "") == "model"


def _computes(job: Job) -> bool:
    """Return whether a job has a model, not just its tokens."""
    return not isinstance(job, GeneratingJob) or job.engine != "echo"
