"""The number formats of a run, made ready on a rank's device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from launcher.errors import ConfigError
from launcher.precision import Tf32

if TYPE_CHECKING:
    from launcher.precision import Precision


def prepare_formats(precision: Precision, *, device: torch.device) -> None:
    """Set what torch multiplies fp32 matrices in; before the model is built.

    Raises:
        ConfigError: the device has no units for the format, so that torch would compute in another one.
    """
    if precision.needs_capability is not None:
        has = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        refuse_incapable(precision, has)
    if isinstance(precision, Tf32):
        # the older of torch's two interfaces: its compiler refuses a process in which the newer one was used
        torch.set_float32_matmul_precision("high")


def refuse_incapable(precision: Precision, capability: tuple[int, int] | None) -> None:
    """Refuse a GPU that is older than the format, or none at all.

    Args:
        precision: of the run.
        capability: CUDA compute capability of the device; ``None`` for a CPU.

    Raises:
        ConfigError: always says which capability would do.
    """
    needed = precision.needs_capability
    if needed is None or (capability is not None and capability >= needed):
        return
    here = "this rank has no GPU" if capability is None else "this GPU has {}.{}".format(*capability)
    why = "it takes a GPU of compute capability {}.{} or more, and ".format(*needed) + here
    raise ConfigError("precision", precision.kind, why=why, fix=f"set precision={precision.compute}")
