"""Build the run's model on this rank, in the run's precision, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from launcher.config.precision import Tf32Precision
from launcher.errors import ConfigError
from launcher.models.build import build_model
from launcher.models.deferred_init import PartCallback, leave_part
from launcher.models.transforms import apply_compile, apply_float8
from launcher.utils.progress import OnProgress, ProgressLines, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.config.precision import Precision
    from launcher.config.run import Run
    from launcher.engines.context import Context


def build_run_model(
    context: Context,
    *,
    device: torch.device,
    after: PartCallback = leave_part,
    laid_out: Callable[[PreTrainedModel], None] = lambda model: None,
) -> PreTrainedModel:
    """Return the run's model with fp32 weights.

    Fetching, converting and drawing them counts as progress.

    Args:
        context: of this rank.
        device: where the model will run; it is not moved there.
        after: takes each part of the model as soon as it is there.
        laid_out: takes the model before any of it is.

    Raises:
        ConfigError: the device, or the model's family, cannot do what the run asks for.
    """
    run = context.run

    def prepare(model: PreTrainedModel) -> None:
        prepare_model(model, run, device=device)
        laid_out(model)

    return build_model(
        run.model,
        seed=run.job.seed,
        attention=run.attention,
        activation=run.activation,
        transforms=getattr(run.job, "transforms", ()),
        adapter=run.lora,
        after=after,
        laid_out=prepare,
        heartbeat=lambda: context.heartbeat.update("load"),
        on_progress=weights_progress(context),
    )


def weights_progress(context: Context) -> OnProgress:
    """Return what prints how much of its weights rank 0 has loaded, if that takes seconds."""
    share = " (share of rank 0)" if context.dims.pipeline > 1 else ""
    return ProgressLines(f"loading the weights{share}").update if context.is_main else no_progress


def prepare_model(model: PreTrainedModel, run: Run, *, device: torch.device) -> None:
    """Make a model or stage on meta compute in the run's formats, compiled or not.

    Raises:
        ConfigError: the device, or the model's family, cannot do that.
    """
    prepare_precision(run.precision, device=device)
    apply_float8(model, run.precision)
    apply_compile(model, run.compile, device=device)  # after whatever changes what a block does


def prepare_precision(precision: Precision, *, device: torch.device) -> None:
    """Set what torch multiplies fp32 matrices in; before the model is built.

    Raises:
        ConfigError: the device has no units for the format, so that torch would compute in another one.
    """
    if precision.min_compute_capability is not None:
        has = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        check_capability(precision, has)
    if isinstance(precision, Tf32Precision):
        # the older of torch's two interfaces: its compiler refuses a process in which the newer one was used
        torch.set_float32_matmul_precision("high")


def check_capability(precision: Precision, capability: tuple[int, int] | None) -> None:
    """Raise if the GPU is older than the format, or if there is none.

    Args:
        precision: of the run.
        capability: CUDA compute capability of the device; ``None`` for a CPU.

    Raises:
        ConfigError: always says which capability would do.
    """
    needed = precision.min_compute_capability
    if needed is None or (capability is not None and capability >= needed):
        return
    here = "this rank has no GPU" if capability is None else "this GPU has {}.{}".format(*capability)
    why = "it takes a GPU of compute capability {}.{} or more, and ".format(*needed) + here
    raise ConfigError("precision", precision.kind, why=why, fix=f"set precision={precision.compute}")
