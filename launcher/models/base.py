"""What every model configuration answers, first without importing torch, then on a rank."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.component import Component
from launcher.errors import ConfigError
from launcher.models.tokenizer import has_tokenizer
from launcher.paths import PathText
from launcher.quantization.manifest import Manifest, read_manifest
from launcher.quantization.methods import METHODS, Name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes the planner reckons with."""

    layers: int
    heads: int
    width: int
    vocab_size: int
    context: int
    """Longest sequence the model takes, in tokens."""
    num_params: int
    """Parameters, with tied ones counted once."""
    largest_param: int
    """Elements of the largest single parameter."""
    kv_heads: int
    """Heads of keys and values in a block, at most ``heads``."""
    mlp_width: int
    """Size of the hidden layer of a block's MLP."""
    block_params: int
    """Parameters of one block."""
    tied: bool
    """The output projection is the token embedding."""
    family: str
    """Name of the architecture in Transformers (``gpt2``, ``llama``)."""
    active_params: int | None = None
    """Parameters that one token uses, where a router leaves experts out; ``None`` means all."""

    def flops_per_token(self, sequence_length: int) -> float:
        """Return forward-plus-backward FLOPs a token: 6N + 12·L·width·sequence (PaLM, arXiv:2204.02311, app. B)."""
        return 6.0 * (self.active_params or self.num_params) + 12.0 * self.layers * self.width * sequence_length


@dataclass(frozen=True, kw_only=True)
class Model(Component):
    """A causal language model, built from a configuration or loaded from weights."""

    group: ClassVar[str] = "model"
    headline: ClassVar[tuple[str, ...]] = ("weights",)

    name: str
    """What the model is called in plans, results and W&B; for ``hf``, the hub name or local folder."""

    weights: PathText = "random"
    """``random``, ``pretrained`` where the model has weights to load, or a local folder of safetensors."""

    quantization: Name = "none"
    """Quantise the weights as they are loaded; a folder that ``job=quantize`` wrote says by itself how it is."""

    @abstractmethod
    def shape(self) -> Shape | None:
        """Return the sizes, or ``None`` when they are only known once files are downloaded."""

    def family(self) -> str | None:
        """Return the name of the architecture in Transformers, ``None`` where it is not known on this machine."""
        shape = self.shape()
        return None if shape is None else shape.family

    def stored_config(self) -> Mapping[str, Any] | None:
        """Return what the model's own ``config.json`` holds, ``None`` where there is none on this machine."""
        return None

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """Return what must be equal for a checkpoint of one run to fit another."""

    def preflight(self) -> Iterator[ConfigError]:
        """Yield what the file system says against this model, without importing torch."""
        if self.weights not in ("random", "pretrained"):
            from launcher.models.weights import folder_problems

            yield from folder_problems("model.weights", self.weights, architecture=self.architecture())

    @abstractmethod
    def transformers_config(self) -> PreTrainedConfig:
        """Return the configuration to build from. Rank side: imports Transformers."""

    @abstractmethod
    def pretrained_folder(self, *, with_weights: bool, beat: Callable[[], None]) -> Path:
        """Return the local folder that holds config, tokenizer and, if asked for, pretrained weights.

        Rank side. Downloads or converts what is missing, once per machine; ``beat`` is called meanwhile.

        Raises:
            EnvironmentProblem: they are not here and cannot be fetched; the message says what to type.
        """

    @property
    def local_weights(self) -> Path | None:
        """The folder of weights that the user named."""
        return None if self.weights in ("random", "pretrained") else Path(self.weights).expanduser()

    def kept_as(self) -> Manifest | None:
        """Return how the weights in the folder that the user named are quantised, if they are.

        Raises:
            ConfigError: the folder says so in a way that cannot be read.
        """
        return None if self.local_weights is None else read_manifest(self.local_weights)

    def quantization_problems(self) -> Iterator[ConfigError]:
        """Yield packages that are missing for the way the weights are, or will be, quantised."""
        if self.quantization != "none":
            yield from METHODS[self.quantization]().preflight("model.quantization")
            return
        try:
            manifest = self.kept_as()
        except ConfigError as problem:
            yield problem
            return
        if manifest is not None:
            yield from manifest.method.preflight("model.weights")

    def weights_folder(self, *, beat: Callable[[], None]) -> Path | None:
        """Return the folder to load weights from, ``None`` for random ones. Rank side."""
        if self.weights == "random":
            return None
        if self.weights == "pretrained":
            return self.pretrained_folder(with_weights=True, beat=beat)
        return Path(self.weights).expanduser()

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether a tokenizer belongs to the weights: published with them, or beside them in their folder."""
        return self.weights == "pretrained" if self.local_weights is None else has_tokenizer(self.local_weights)

    def tokenizer_source(self) -> Path | str | None:
        """Return the folder or hub name that ``tokenizer_folder`` loads from; ``None`` where a rank makes the folder.

        Raises:
            ConfigError: the model has no tokenizer.
        """
        if self.weights not in ("random", "pretrained") and has_tokenizer(Path(self.weights).expanduser()):
            return Path(self.weights).expanduser()
        return self.published_source()

    def published_source(self) -> Path | str | None:
        """Return the folder or hub name of ``pretrained_folder``; ``None`` where a rank makes the folder."""
        return None

    def tokenizer_folder(self, *, beat: Callable[[], None]) -> Path:
        """Return the folder that holds the model's own tokenizer: the given weights', else the published one's."""
        own = Path(self.weights).expanduser()
        if self.weights not in ("random", "pretrained") and has_tokenizer(own):
            return own
        return self.pretrained_folder(with_weights=False, beat=beat)
