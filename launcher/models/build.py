"""Build a model on a rank: random or loaded, whole or spread over ranks while it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from launcher.errors import ConfigError, ConfigErrors
from launcher.models.kernels import attention_of
from launcher.models.lazy import After, Builder, Source, causal_lm_class, leave, skeleton
from launcher.models.recompute import apply_activation
from launcher.models.stored import StoredTensors, untie_what_differs
from launcher.models.weights import folder_problems, tensor_files, weight_files
from launcher.quantization.convert import Converter, Restorer, metadata_of
from launcher.quantization.manifest import read_manifest
from launcher.quantization.methods import method_named

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from launcher.activation import Activation
    from launcher.attention import Attention
    from launcher.models.base import Model
    from launcher.quantization.base import Quantization

_SHOWN = 5
_BAD_CONFIG = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What constructors of models raise over configurations that make no sense to them."""


def build_model(
    model: Model,
    *,
    seed: int,
    attention: Attention,
    activation: Activation,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    after: After = leave,
    laid_out: Callable[[PreTrainedModel], None] = lambda model: None,
    beat: Callable[[], None] = lambda: None,
) -> PreTrainedModel:
    """Return the model in training mode, on the CPU or wherever ``after`` puts its parts.

    Args:
        model: what to build.
        seed: of random weights; the same seed gives the same ones under every strategy. Also seeds torch's global
            generator, for dropout.
        attention: which kernel.
        activation: which blocks are recomputed in the backward pass.
        dtype: of the parameters.
        quantization: how weights are quantised as they come; ``None`` leaves that to ``model.quantization``.
        after: called with each part of the model, and its name, as soon as it is there: no rank need hold all of it.
        laid_out: called with the model when none of it has storage yet.
        beat: called while weights are fetched, converted or drawn.

    Raises:
        ConfigError: the weights do not fit the model exactly, with the names of the parameters; or the model's family
            lacks this attention, or blocks that can be recomputed.
        EnvironmentProblem: weights cannot be fetched.
    """
    built, builder, layers = _lay_out(
        model, seed=seed, attention=attention, dtype=dtype, quantization=quantization, beat=beat
    )
    apply_activation(built, activation)
    laid_out(built)

    def then(name: str, part: nn.Module) -> None:
        after(name, part)
        beat()

    builder.build_all(then)
    if layers is not None:
        layers.check()
    torch.manual_seed(seed)
    built.train()
    return built


def lay_out(
    model: Model,
    *,
    seed: int,
    attention: Attention,
    dtype: torch.dtype = torch.float32,
    beat: Callable[[], None] = lambda: None,
) -> tuple[PreTrainedModel, Builder]:
    """Return the model without storage, and what fills it part by part; arguments and errors are those above."""
    return _lay_out(model, seed=seed, attention=attention, dtype=dtype, quantization=None, beat=beat)[:2]


def _lay_out(
    model: Model,
    *,
    seed: int,
    attention: Attention,
    dtype: torch.dtype,
    quantization: Quantization | None,
    beat: Callable[[], None],
) -> tuple[PreTrainedModel, Builder, Converter | Restorer | None]:
    transformers_logging.disable_progress_bar()
    folder = model.weights_folder(beat=beat)
    config = model.transformers_config()
    if folder is not None:
        problems = list(folder_problems("model.weights", str(folder), architecture=None))
        if problems:
            raise ConfigErrors(problems)
    laid_out = _skeleton(model, config, attention=attention, dtype=dtype)
    manifest = read_manifest(folder) if folder is not None else None
    method, option = quantization or method_named(model.quantization), "model.quantization"
    if quantization is not None:
        option = "quantization"
    if manifest is not None and method is not None and method.kind != manifest.method.kind:
        why = f"the weights in {folder} are {manifest.method.kind} already"
        raise ConfigError(option, method.kind, why=why, fix="give the original weights")
    if manifest is not None and folder is not None:
        restorer = Restorer(laid_out, manifest, folder)
        files, metadata = tensor_files(folder), metadata_of(weight_files(folder))
        source = _source(model, laid_out, folder, skip=restorer.owns)

        def tensor(name: str) -> torch.Tensor:
            with safe_open(files[name], framework="pt") as opened:
                found: torch.Tensor = opened.get_tensor(name)
                return found

        def restore(part: str) -> None:
            restorer.restore(part, tensor, metadata)

        return laid_out, Builder(laid_out, seed=seed, source=source, then=restore), restorer
    known = _source(model, laid_out, folder) if folder is not None else None
    if method is not None:
        converter = Converter(laid_out, method, option=option)
        return laid_out, Builder(laid_out, seed=seed, source=known, then=converter.convert), converter
    return laid_out, Builder(laid_out, seed=seed, source=known), None


def _skeleton(model: Model, config: PreTrainedConfig, *, attention: Attention, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model without storage.

    Raises:
        ConfigError: Transformers has no causal language model of this configuration, or cannot build one from it.
    """
    option, value = ("model.name", model.name) if model.kind == "hf" else ("model", model.name)
    fix = "choose a causal language model that the installed Transformers knows, or mend its config.json"
    try:
        family = causal_lm_class(config)
    except KeyError:
        why = f"the installed Transformers has no causal language model of type {config.model_type}"
        raise ConfigError(option, value, why=why, fix=fix) from None
    kernel = attention_of(family, attention)
    try:
        return skeleton(config, attention=kernel, dtype=dtype)
    except _BAD_CONFIG as error:
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        why = f"Transformers cannot build {family.__name__} from its config.json ({first})"
        raise ConfigError(option, value, why=why, fix=fix) from error


def _source(
    model: Model, laid_out: PreTrainedModel, folder: Path, *, skip: Callable[[str], bool] = lambda name: False
) -> Source:
    """Return where weights come from; names and shapes are compared first, so no rank fails while others wait.

    Raises:
        ConfigError: the files do not hold exactly this model.
    """
    stored = StoredTensors(laid_out, folder, skip=skip)
    misfits = [f"{name} is {found} instead of {wanted}" for name, (found, wanted) in stored.mismatched().items()]
    misfits += [f"{name} cannot be converted ({why})" for name, why in stored.unconverted.items()]
    parts = [
        f"{what} {_listed(names)}"
        for what, names in (("lacks", stored.missing), ("has besides", stored.unexpected), ("misfits:", misfits))
        if names
    ]
    if parts:
        why = f"{folder} does not hold this model: it {', and it '.join(parts)}"
        raise ConfigError("model.weights", model.weights, why=why, fix="choose the model that these weights are of")
    if untied := untie_what_differs(laid_out, stored):
        names = _listed(untied)
        print(f"weights: {folder} holds {names} apart, though its config ties them: they stay apart", flush=True)
    return stored.read


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
