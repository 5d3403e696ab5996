"""Build a model on a rank: random or loaded, whole or spread over ranks while it is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from launcher.errors import ConfigError, ConfigErrors
from launcher.models.kernels import attention_of
from launcher.models.lazy import After, Builder, Source, files_in, leave, skeleton
from launcher.models.recompute import apply_activation
from launcher.models.weights import folder_problems, tensor_shapes, weight_files
from launcher.quantization.convert import Converter, Restorer, metadata_of
from launcher.quantization.manifest import read_manifest
from launcher.quantization.methods import method_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.activation import Activation
    from launcher.attention import Attention
    from launcher.models.base import Model
    from launcher.quantization.base import Quantization

_SHOWN = 5


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
    kernel = attention_of(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], attention)
    laid_out = skeleton(config, attention=kernel, dtype=dtype)
    manifest = read_manifest(folder) if folder is not None else None
    method, option = quantization or method_named(model.quantization), "model.quantization"
    if quantization is not None:
        option = "quantization"
    if manifest is not None and method is not None and method.kind != manifest.method.kind:
        why = f"the weights in {folder} are {manifest.method.kind} already"
        raise ConfigError(option, method.kind, why=why, fix="give the original weights")
    if manifest is not None and folder is not None:
        restorer = Restorer(laid_out, manifest, folder)
        read, stored = files_in(folder, prefix=""), tensor_shapes(folder)
        metadata = metadata_of(weight_files(folder))
        source = _source(model, laid_out, folder, restorer)

        def tensor(name: str) -> torch.Tensor:
            if name not in stored:
                raise KeyError(name)
            return read([name])

        def restore(part: str) -> None:
            restorer.restore(part, tensor, metadata)

        return laid_out, Builder(laid_out, seed=seed, source=source, then=restore), restorer
    known = _source(model, laid_out, folder) if folder is not None else None
    if method is not None:
        converter = Converter(laid_out, method, option=option)
        return laid_out, Builder(laid_out, seed=seed, source=known, then=converter.convert), converter
    return laid_out, Builder(laid_out, seed=seed, source=known), None


def _source(model: Model, laid_out: PreTrainedModel, folder: Path, restorer: Restorer | None = None) -> Source:
    """Return where weights come from; names and shapes are compared first, so no rank fails while others wait."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not get_model_conversion_mapping(laid_out, add_legacy=False):
        _check_names(model, laid_out, folder, restorer)
        return files_in(folder, prefix=f"{laid_out.base_model_prefix}.")
    if restorer is not None:
        why = f"Transformers rearranges weights of {model.name}, which it cannot once they are quantised"
        raise ConfigError("model.weights", str(folder), why=why, fix="give the original, and set model.quantization")
    print(f"weights: Transformers rearranges those of {model.name}, so each rank loads them whole at first", flush=True)
    whole, report = AutoModelForCausalLM.from_pretrained(
        folder, config=laid_out.config, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    _refuse(model, folder, missing=report["missing_keys"], unexpected=report["unexpected_keys"])
    tensors = whole.state_dict()
    return lambda names: next(tensors[name] for name in names if name in tensors)


def _check_names(model: Model, skeleton: PreTrainedModel, folder: Path, restorer: Restorer | None) -> None:
    """Compare names and shapes with the files' headers; those of quantised layers are compared as they are restored."""
    wanted = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    prefix = f"{skeleton.base_model_prefix}."
    found = {
        f"{prefix}{name}" if name not in wanted and f"{prefix}{name}" in wanted else name: shape
        for name, shape in tensor_shapes(folder).items()
        if restorer is None or not restorer.owns(name)
    }
    ignored = re.compile("|".join(skeleton._keys_to_ignore_on_load_unexpected or ["$^"]))  # noqa: SLF001
    _refuse(
        model,
        folder,
        missing=wanted.keys() - found.keys() - skeleton.all_tied_weights_keys.keys(),
        unexpected=[name for name in found.keys() - wanted.keys() if not ignored.search(name)],
        mismatched=[
            f"{name} is {found[name]} instead of {wanted[name]}"
            for name in found.keys() & wanted.keys()
            if found[name] != wanted[name]
        ],
    )


def _refuse(
    model: Model, folder: Path, *, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str] = ()
) -> None:
    parts = [
        f"{what} {_listed(names)}"
        for what, names in (("lacks", missing), ("has besides", unexpected), ("misfits:", mismatched))
        if set(names)
    ]
    if parts:
        why = f"{folder} does not hold this model: it {', and it '.join(parts)}"
        raise ConfigError("model.weights", model.weights, why=why, fix="choose the model that these weights are of")


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
