"""Build a model on a rank: random or loaded, whole or partitioned by ZeRO-3 while it is built."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from launcher.errors import ConfigError, ConfigErrors
from launcher.models.kernels import attention_of
from launcher.models.recompute import apply_activation
from launcher.models.weights import folder_problems, tensor_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from launcher.activation import Activation
    from launcher.attention import Attention
    from launcher.models.base import Model

_SHOWN = 5


def build_model(
    model: Model,
    *,
    seed: int,
    attention: Attention,
    activation: Activation,
    dtype: torch.dtype = torch.float32,
    beat: Callable[[], None] = lambda: None,
) -> PreTrainedModel:
    """Return the model in training mode, on the CPU or wherever ZeRO-3 puts its partitions.

    For ZeRO-3 the caller keeps an ``HfDeepSpeedConfig`` alive around this call, after ``init_distributed``;
    Transformers then partitions each module as it is built. Every rank must call.

    Args:
        model: what to build.
        seed: seeds torch's global generators, so that every rank draws the same random weights.
        attention: which kernel.
        activation: which blocks are recomputed in the backward pass.
        dtype: of the parameters; under ZeRO-3 the DeepSpeed configuration's takes precedence.
        beat: called while weights are fetched or converted.

    Raises:
        ConfigError: the weights do not fit the model exactly, with the names of the parameters; or the model's family
            lacks this attention, or blocks that can be recomputed.
        EnvironmentProblem: weights cannot be fetched.
    """
    transformers_logging.disable_progress_bar()
    folder = model.weights_folder(beat=beat)
    config = model.transformers_config()
    kernel = attention_of(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], attention)
    torch.manual_seed(seed)
    if folder is None:
        built = AutoModelForCausalLM.from_config(config, attn_implementation=kernel, dtype=dtype)
    else:
        built = _load(model, config, folder, attention=kernel, dtype=dtype)
    apply_activation(built, activation)
    built.train()
    return built


def _load(
    model: Model, config: PreTrainedConfig, folder: Path, *, attention: str, dtype: torch.dtype
) -> PreTrainedModel:
    problems = list(folder_problems("model.weights", str(folder), architecture=None))
    if problems:
        raise ConfigErrors(problems)
    _check_names(model, config, folder)
    built, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        attn_implementation=attention,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    _refuse(model, folder, missing=report["missing_keys"], unexpected=report["unexpected_keys"])
    return built


def _check_names(model: Model, config: PreTrainedConfig, folder: Path) -> None:
    """Compare names and shapes with the files' headers before anything is loaded.

    Transformers' own report cannot do it under ZeRO-3: there it lists no unexpected keys, and a wrong shape ends one
    rank while the others wait for it. Families whose parameters Transformers rearranges on loading keep to that report.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        skeleton = family(copy.deepcopy(config))  # not by from_config, which partitions under ZeRO-3
    if get_model_conversion_mapping(skeleton, add_legacy=False):
        return
    wanted = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    prefix = f"{skeleton.base_model_prefix}."
    found = {
        f"{prefix}{name}" if name not in wanted and f"{prefix}{name}" in wanted else name: shape
        for name, shape in tensor_shapes(folder).items()
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
