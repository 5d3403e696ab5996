"""Build a model on a rank: random or loaded, whole or spread over ranks while it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from launcher.config.adapter_folder import AdapterUse, read_adapter_folder
from launcher.config.model.folder import tensor_files, validate_model_folder, weight_files
from launcher.config.quantization import method_named, read_manifest
from launcher.errors import ConfigError, ConfigErrors
from launcher.models.adapters import InjectedAdapter, MergedWeights
from launcher.models.attention import attention_implementation
from launcher.models.deferred_init import (
    ModelBuilder,
    PartCallback,
    TensorSource,
    causal_lm_class,
    leave_part,
    meta_model,
)
from launcher.models.plugin_transforms import apply_transforms
from launcher.models.pretrained import transformers_config, weights_folder
from launcher.models.transforms import apply_activation_checkpointing
from launcher.models.weights import differences, find_tensors, listed, untie_differing_weights
from launcher.plugins.base import TRANSFORM
from launcher.plugins.loading import origin_of, plugin_kinds
from launcher.quantization.convert import Converter, Restorer, metadata_of
from launcher.quantization.layers import matrices
from launcher.utils.progress import OnProgress, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from launcher.config.activation import ActivationCheckpointing
    from launcher.config.adapter import Lora
    from launcher.config.adapter_folder import AdapterFolder
    from launcher.config.attention import Attention
    from launcher.config.model.base import Model
    from launcher.config.quantization import Quantization

_BAD_CONFIG = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of model constructors for invalid configurations."""


def build_model(
    model: Model,
    *,
    seed: int,
    attention: Attention,
    activation: ActivationCheckpointing,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    transforms: Sequence[str] = (),
    adapter: Lora | None = None,
    after: PartCallback = leave_part,
    laid_out: Callable[[PreTrainedModel], None] = lambda model: None,
    heartbeat: Callable[[], None] = lambda: None,
    on_progress: OnProgress = no_progress,
) -> PreTrainedModel:
    """Return the model in training mode, on the CPU or wherever ``after`` puts its parts.

    Args:
        model: what to build.
        seed: of random weights; the same seed gives the same ones under every strategy. Also seeds torch's global
            generator, for dropout.
        attention: which kernel.
        activation: which blocks are recomputed in the backward pass.
        dtype: of the parameters.
        quantization: how weights are quantized as they come; ``None`` leaves that to ``model.quantization``.
        transforms: of plugins, applied when none of it has storage yet.
        adapter: to inject, so that it can be trained; its values are those of ``model.adapter``, or new. With ``None``
            the adapter of ``model.adapter``, if there is one, is merged into the weights, or applied to quantized ones.
        after: called with each part of the model, and its name, as soon as it is there: no rank need hold all of it.
        laid_out: called with the model when none of it has storage yet.
        heartbeat: called while weights are fetched, converted or drawn.
        on_progress: called with the bytes of weights that are there, and those of all that this rank loads.

    Raises:
        ConfigError: the weights do not fit the model exactly, with the names of the parameters; or the model's family
            lacks this attention, or blocks that can be recomputed.
        EnvironmentProblem: weights cannot be fetched.
    """
    built, builder, layers = _build_deferred(
        model,
        seed=seed,
        attention=attention,
        dtype=dtype,
        quantization=quantization,
        transforms=transforms,
        adapter=adapter,
        heartbeat=heartbeat,
        on_progress=on_progress,
    )
    apply_activation_checkpointing(built, activation)
    laid_out(built)

    def then(name: str, part: nn.Module) -> None:
        after(name, part)
        heartbeat()

    builder.build_all(then)
    if layers is not None:
        layers.check()
    torch.manual_seed(seed)
    built.train()
    return built


def build_deferred(
    model: Model,
    *,
    seed: int,
    attention: Attention,
    dtype: torch.dtype = torch.float32,
    adapter: Lora | None = None,
    heartbeat: Callable[[], None] = lambda: None,
    on_progress: OnProgress = no_progress,
) -> tuple[PreTrainedModel, ModelBuilder]:
    """Return the model without storage, and what fills it part by part.

    Arguments and errors are those of ``build_model``.
    """
    return _build_deferred(
        model,
        seed=seed,
        attention=attention,
        dtype=dtype,
        quantization=None,
        adapter=adapter,
        heartbeat=heartbeat,
        on_progress=on_progress,
    )[:2]


def skeleton(model: Model, *, attention: Attention, transforms: Sequence[str] = ()) -> PreTrainedModel:
    """Return the model without storage, transformed.

    Arguments and errors are those of ``build_model``.
    """
    laid_out = _skeleton(model, transformers_config(model), attention=attention, dtype=torch.float32)
    apply_transforms(laid_out, transforms)
    return laid_out


def _build_deferred(
    model: Model,
    *,
    seed: int,
    attention: Attention,
    dtype: torch.dtype,
    quantization: Quantization | None,
    heartbeat: Callable[[], None],
    on_progress: OnProgress,
    transforms: Sequence[str] = (),
    adapter: Lora | None = None,
) -> tuple[PreTrainedModel, ModelBuilder, Converter | Restorer | None]:
    transformers_logging.disable_progress_bar()
    folder = weights_folder(model, heartbeat=heartbeat)
    config = transformers_config(model)
    if folder is not None:
        own_family = model.family() if origin_of("model", model.kind) else None
        errors = list(validate_model_folder("model.weights", str(folder), architecture=None, own_family=own_family))
        if errors:
            raise ConfigErrors(errors)
    laid_out = _skeleton(model, config, attention=attention, dtype=dtype)
    added = apply_transforms(laid_out, transforms)
    layers = _quantized_layers(model, laid_out, folder, quantization)
    source: TensorSource | None = None
    if folder is not None:
        skip = layers.owns if isinstance(layers, Restorer) else lambda name: False
        source = _reporting(_source(model, laid_out, folder, skip=skip), laid_out, on_progress)
    finish: Callable[[str], None] = lambda part: None  # noqa: E731  (replaced below)
    stored = None
    if model.adapter is not None:
        stored = read_adapter_folder("model.adapter", model.adapter, use=AdapterUse.MODEL)
    if stored is not None and adapter is None and layers is not None and quantization is None:
        adapter = stored.lora  # quantized weights cannot take it up
    if adapter is not None:
        if isinstance(layers, Restorer):
            layers.take_back()
        injected = InjectedAdapter(laid_out, adapter, seed=seed, folder=stored, base=_name_of_base(model, folder))
        if layers is not None:
            layers.move(injected.path)
        source, finish = injected.source(source), injected.finish_part
    elif stored is not None:
        source = _merged(laid_out, stored, source)
    then: Callable[[str], None] = finish
    if isinstance(layers, Restorer) and folder is not None:
        files, metadata = tensor_files(folder), metadata_of(weight_files(folder))
        restorer = layers

        def tensor(name: str) -> torch.Tensor:
            with safe_open(files[name], framework="pt") as opened:
                found: torch.Tensor = opened.get_tensor(name)
                return found

        def restore(part: str) -> None:
            restorer.restore(part, tensor, metadata)
            finish(part)

        then = restore
    elif isinstance(layers, Converter):
        converter = layers

        def convert(part: str) -> None:
            converter.convert(part)
            finish(part)

        then = convert
    return laid_out, ModelBuilder(laid_out, seed=seed, source=source, then=then, added=added), layers


def _reporting(source: TensorSource, laid_out: PreTrainedModel, on_progress: OnProgress) -> TensorSource:
    """Return a source of weights that reports what it has read.

    What there is to read is known at the first read: until then parts of the model may be cut off. Quantized layers,
    whose matrices are read elsewhere, count as their biases. The parameters of an adapter are added later.
    """
    done = total = 0
    own = {id(each): each for each in laid_out.parameters()}

    def is_read(parameter: nn.Parameter) -> bool:
        """Return whether it is the model's own, also in the part that is being filled."""
        return id(parameter) in own or not parameter.is_meta

    def read(names: Sequence[str]) -> torch.Tensor | None:
        nonlocal done, total
        total = total or sum(each.numel() * each.element_size() for each in filter(is_read, laid_out.parameters()))
        found = source(names)
        if found is not None:
            done += found.numel() * found.element_size()
            on_progress(done, max(done, total))
        return found

    return read


def _name_of_base(model: Model, folder: Path | None) -> str:
    """Return PEFT's name of the model of an adapter: a hub name, or a folder's whole path.

    PEFT takes a bare name of a folder for a name on the hub.
    """
    source = model.pretrained_source() if model.weights == "pretrained" else None
    if isinstance(source, str):
        return source
    return model.name if folder is None else str(folder.absolute())


def _quantized_layers(
    model: Model, laid_out: PreTrainedModel, folder: Path | None, quantization: Quantization | None
) -> Converter | Restorer | None:
    """Return what quantizes the model's layers, or restores quantized ones from the folder.

    Raises:
        ConfigError: the weights are quantized already, in another way.
    """
    manifest = read_manifest(folder) if folder is not None else None
    method, option = quantization or method_named(model.quantization), "model.quantization"
    if quantization is not None:
        option = "quantization"
    if manifest is not None and method is not None and method.kind != manifest.method.kind:
        why = f"the weights in {folder} are {manifest.method.kind} already"
        raise ConfigError(option, method.kind, why=why, fix="give the original weights")
    if manifest is not None and folder is not None:
        return Restorer(laid_out, manifest, folder)
    return None if method is None else Converter(laid_out, method, option=option)


def _merged(laid_out: PreTrainedModel, found: AdapterFolder, source: TensorSource | None) -> TensorSource:
    """Return the source of weights with an adapter added.

    Raises:
        ConfigError: the adapter is of another model, or the model has no weights to add it to.
    """
    if source is None:
        why = "an adapter belongs to the weights that it was trained on, and this model has random ones"
        raise ConfigError("model.adapter", str(found.folder), why=why, fix="set model.weights to them")
    layers = matrices(laid_out)
    if strange := [name for name in found.layers if name not in layers]:
        why = f"is of another model ({found.base}): it has matrices for {strange[0]}, and this model has no such layer"
        raise ConfigError("model.adapter", str(found.folder), why=why, fix="choose the model that it was trained on")
    return MergedWeights(found, source, transposed=lambda name: isinstance(layers[name], Conv1D)).read


def _skeleton(model: Model, config: PreTrainedConfig, *, attention: Attention, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model without storage.

    Raises:
        ConfigError: Transformers has no causal language model of this configuration, or cannot build one from it.
    """
    option, value = ("model.name", model.name) if model.kind == "hf" else ("model", model.name)
    fix = "choose a causal language model that the installed Transformers knows, or correct its config.json"
    try:
        family = causal_lm_class(config)
    except KeyError:
        why = f"the installed Transformers has no causal language model of type {config.model_type}"
        raise ConfigError(option, value, why=why, fix=fix) from None
    kernel = attention_implementation(family, attention)
    try:
        return meta_model(config, attention=kernel, dtype=dtype)
    except _BAD_CONFIG as error:
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        why = f"Transformers cannot build {family.__name__} from its config.json ({first})"
        raise ConfigError(option, value, why=why, fix=fix) from error


def _source(
    model: Model, laid_out: PreTrainedModel, folder: Path, *, skip: Callable[[str], bool] = lambda name: False
) -> TensorSource:
    """Return the source of weights, after its names and shapes are compared with the model.

    So no rank fails while others wait.

    Raises:
        ConfigError: the files do not hold exactly this model.
    """
    stored = find_tensors(laid_out, folder, skip=skip)
    if wrong := differences(stored):
        why = f"{folder} does not hold this model: {wrong}"
        fix = "choose the model of these weights"
        if plugin_kinds(TRANSFORM):
            fix += ", with the job.transforms that they were trained with"
        raise ConfigError("model.weights", model.weights, why=why, fix=fix)
    if untied := untie_differing_weights(laid_out, stored):
        names = listed(untied)
        print(
            f"weights: {folder} holds {names} separately, though its config ties them: they stay separate", flush=True
        )
    return stored.read
