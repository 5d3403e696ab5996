"""The model group: fields and checks of every model, and what its tokenizer's files say."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from launcher.config.component import Component
from launcher.config.model.folder import validate_model_folder
from launcher.config.model.image_text import PROCESSOR_FILES, ImageText
from launcher.config.model.shape import Shape
from launcher.config.paths import PathText
from launcher.config.quantization import METHODS, QuantizationManifest, QuantizationName, read_manifest
from launcher.errors import ConfigError
from launcher.utils.files import exists
from launcher.utils.hub import cached_folder

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
    *("chat_template*", "additional_chat_templates/*.jinja", "generation_config.json"),
    *PROCESSOR_FILES[:3],
)
"""Files of a tokenizer and processor in a model folder, with what names its end tokens."""

VOCABULARY_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""Files of which a tokenizer needs one."""

FOLDER_WITH_TOKENIZER = "FOLDER to a folder with the tokenizer of these weights"
_INSTEAD = {"data.tokenizer": "data.tokenizer=bpe to train one on the text", "job.tokenizer": "job.tokenizer=bytes"}


def tokenizer_alternative(option: str) -> str:
    """Return what to set if a model has no tokenizer of its own."""
    return _INSTEAD[option]


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder that this process can read holds a tokenizer's vocabulary."""
    return any(exists(folder / name) for name in VOCABULARY_FILES)


def tokenizer_size(folder: Path) -> int | None:
    """Return a folder's largest token id plus one; ``None`` where only a rank can count.

    Raises:
        OSError: ``tokenizer.json`` cannot be read.
        ValueError: it is damaged; the message names it.
    """
    file = folder / VOCABULARY_FILES[0]
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        vocabulary, added = tree["model"]["vocab"], tree.get("added_tokens") or []
        numbers = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return max((*numbers, *(token["id"] for token in added)), default=-1) + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{file.name} holds no vocabulary of a tokenizer") from None


def validate_tokenizer_folder(
    option: str, value: object, folder: Path, *, num_rows: int | None, alternative: str | None
) -> Iterator[ConfigError]:
    """Yield why the tokenizer of ``folder`` cannot be used, judged by its files alone.

    Args:
        option: the option that chose it.
        value: of that option.
        folder: a model folder, or one that a tokenizer was saved into.
        num_rows: of the model's embedding, one a token; ``None`` where they are not known.
        alternative: what the job takes where there is no such folder; ``None`` where it takes nothing else.
    """
    instead = f"set {option}={FOLDER_WITH_TOKENIZER}" + (f", or {alternative}" if alternative else "")
    if not has_tokenizer(folder):
        why = f"{folder} holds no tokenizer (none of {', '.join(VOCABULARY_FILES)})"
        yield ConfigError(option, value, why=why, fix=instead)
        return
    try:
        size = tokenizer_size(folder)
    except (OSError, ValueError) as error:
        yield ConfigError(option, value, why=f"the tokenizer in {folder} cannot be read: {error}", fix=instead)
        return
    if size is not None and num_rows is not None and size > num_rows:
        why = f"the tokenizer in {folder} has {size} tokens, and the model {num_rows} embedding rows, one per token"
        yield ConfigError(option, value, why=why, fix=instead)


@dataclass(frozen=True, kw_only=True)
class Model(Component):
    """A causal language model, built from a configuration or loaded from weights."""

    group: ClassVar[str] = "model"
    summary_fields: ClassVar[tuple[str, ...]] = ("weights",)

    name: str
    """Name of the model in plans, results and W&B; for ``hf``, the hub name or local folder."""

    weights: PathText = "random"
    """``random``, ``pretrained`` if the model has such weights, or a folder of weights.
    A folder is of safetensors, or a run or checkpoint, also of another program."""

    quantization: QuantizationName = "none"
    """Quantize the weights as they are loaded.
    A folder that ``job=quantize`` wrote records its own method."""

    adapter: PathText | None = None
    """A trained adapter for the weights: a PEFT folder, a run or a checkpoint.
    ``job=train`` continues its training; every other job uses it."""

    @abstractmethod
    def shape(self) -> Shape | None:
        """Return the sizes, or ``None`` when they are only known once files are downloaded."""

    def validate_length(self, *, spare: int = 0, **lengths: int) -> Iterator[ConfigError]:
        """Yield an error if the sum of these lengths exceeds the model's longest sequence.

        Args:
            spare: tokens besides.
            lengths: tokens by option, its dot written as two underscores (``job__rate_prompt``); the first is named.
        """
        shape, total = self.shape(), sum(lengths.values()) + spare
        if shape is None or total <= shape.max_position_embeddings:
            return
        most = shape.max_position_embeddings
        (option, length), *others = [(name.replace("__", "."), length) for name, length in lengths.items()]
        rest = total - length
        sizes = {option: most - rest}
        if rest >= most:
            share = (most - spare) // len(lengths)
            sizes = {option: share, **{name: min(other, share) for name, other in others}}
        why = f"{self.name} takes at most {most} tokens"
        if others:
            why += f", not {' + '.join(map(str, (*lengths.values(), *filter(None, [spare]))))} = {total}"
            why += f" (with {', '.join(f'{name}={other}' for name, other in others)})"
        fix = f"set {' '.join(f'{name}={size}' for name, size in sizes.items())}"
        yield ConfigError(option, length, why=why, fix=fix)

    def family(self) -> str | None:
        """Return the architecture's name in Transformers; ``None`` if unknown on this machine."""
        shape = self.shape()
        return None if shape is None else shape.family

    def stored_config(self) -> Mapping[str, Any] | None:
        """Return the model's own ``config.json``; ``None`` if it is not on this machine."""
        return None

    def image_text(self) -> ImageText | None:
        """Return what the files say about images; ``None`` of a text model, or without files here."""
        return None

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """Return the values that must be equal for a checkpoint to fit another run."""

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield errors of the files of this model, without importing torch."""
        if self.weights not in ("random", "pretrained"):
            architecture = self.architecture()
            yield from validate_model_folder(
                "model.weights", self.weights, architecture=architecture, own_family=self.family()
            )

    @property
    def local_weights(self) -> Path | None:
        """The folder of weights that the user named."""
        return None if self.weights in ("random", "pretrained") else Path(self.weights).expanduser()

    def weights_folder(self) -> Path | None:
        """Return the folder of the weights; ``None`` for random or not yet downloaded ones."""
        if self.weights == "random":
            return None
        source = self.local_weights or self.pretrained_source()
        return cached_folder(source) if isinstance(source, str) else source

    def quantization_manifest(self) -> QuantizationManifest | None:
        """Return how the weights in the folder that the user named are quantized, if they are.

        Raises:
            ConfigError: the folder says so in a way that cannot be read.
        """
        return None if self.local_weights is None else read_manifest(self.local_weights)

    def validate_quantization(self) -> Iterator[ConfigError]:
        """Yield packages that are missing for the way the weights are, or will be, quantized."""
        if self.quantization != "none":
            yield from METHODS[self.quantization]().validate_machine("model.quantization")
            return
        try:
            manifest = self.quantization_manifest()
        except ConfigError as problem:
            yield problem
            return
        if manifest is not None:
            yield from manifest.method.validate_machine("model.weights")

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether the weights have a tokenizer: published with them, or in their folder."""
        if self.adapter_tokenizer is not None:
            return True
        return self.weights == "pretrained" if self.local_weights is None else has_tokenizer(self.local_weights)

    @property
    def adapter_tokenizer(self) -> Path | None:
        """Return the folder of the adapter, if it holds the tokenizer of the text it was trained on."""
        folder = None if self.adapter is None else Path(self.adapter).expanduser()
        return folder if folder is not None and has_tokenizer(folder) else None

    def tokenizer_source(self) -> Path | str | None:
        """Return the folder or hub name of the tokenizer; ``None`` if a rank makes the folder.

        Raises:
            ConfigError: the model has no tokenizer.
        """
        weights = self.local_weights
        if self.adapter_tokenizer is not None:
            return self.adapter_tokenizer
        if weights is not None and has_tokenizer(weights):
            return weights
        if weights is not None and exists(weights.parent / "manifest.json"):  # no published one knows its tokens
            why = f"the checkpoint {weights.parent} holds no tokenizer: it was trained on data=synthetic"
            raise ConfigError("data.tokenizer", "model", why=why, fix="set data.tokenizer=bpe")
        return self.pretrained_source()

    def pretrained_source(self) -> Path | str | None:
        """Return the folder or hub name of config and tokenizer; ``None`` if a rank makes it."""
        return None
