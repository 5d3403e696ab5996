"""From a run to Transformers' continuous batching, on a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.engines.distributed import choose_device
from launcher.errors import ConfigError
from launcher.serving.model import ends_of, inference_model
from launcher.serving.pages import THEIR_PAGE
from launcher.serving.room import num_pages
from launcher.serving.shapes import Shapes
from launcher.serving.theirs import Theirs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.config import Run
    from launcher.serving.base import Generator
    from launcher.serving.limits import Limits


def make_theirs(run: Run, *, limits: Limits, beat: Callable[[], None], local_rank: int = 0) -> Generator:
    """Return Transformers' continuous batching around the model of a run, on this rank's GPU.

    Raises:
        ConfigError: there is no GPU, or it computes nothing the way that the run says.
        EnvironmentProblem: weights cannot be fetched.
    """
    device = choose_device(local_rank)
    if device.type == "cpu":
        why = "Transformers' continuous batching is made for GPUs, and there is none here; slots is faster on CPUs"
        raise ConfigError("job.engine", "transformers", why=why, fix="set job.engine=slots")
    model = inference_model(run, device=device, engine="transformers", beat=beat)
    return theirs_of(model, limits=limits, ends=ends_of(run, model, beat=beat))


def theirs_of(model: PreTrainedModel, *, limits: Limits, ends: tuple[int, ...]) -> Generator:
    """Return Transformers' continuous batching around a model in inference mode, on any device."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = ((heads, width),) * config.num_hidden_layers
    shapes = Shapes(keys=shape, values=shape, item_bytes=model.dtype.itemsize)
    return Theirs(model, limits=limits, num_pages=num_pages(limits, shapes, model, page=THEIR_PAGE), ends=ends)
