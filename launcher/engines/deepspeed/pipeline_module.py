"""DeepSpeed's ``PipelineModule`` over a model's layers, of which a rank builds its own only.

Imports DeepSpeed, so it comes after ``prepare_environment``.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from launcher.config.parallel.deepspeed_pipeline import DeepSpeedPipeline
from launcher.engines.model import prepare_model, weights_progress
from launcher.models.build import build_deferred
from launcher.models.layers import PassPositions, PipelineBlock, PipelineLayer, pipeline_layers, units
from launcher.models.transforms import apply_activation_checkpointing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.engines.context import Context

_METHODS = {"blocks": f"type:^{PipelineBlock.__name__}$", "parameters": "parameters", "layers": "uniform"}
"""DeepSpeed's names of what stages are made equal in."""

_TIE = "embedding"

Fill = Callable[[PipelineLayer], nn.Module]
LossOf = Callable[[Tensor, Tensor], Tensor]


class _Layer(LayerSpec):  # type: ignore[misc]
    """A layer that is filled when its stage is built."""

    def __init__(self, link: PipelineLayer, fill: Fill) -> None:
        super().__init__(type(link.layer))
        self.link, self._fill = link, fill

    def build(self, log: bool = False) -> nn.Module:
        return self._fill(self.link)


class _TiedLayer(TiedLayerSpec):  # type: ignore[misc]
    """A layer whose ``weight`` another stage shares.

    Their gradients are summed, and the norm counts the first.

    A checkpoint leaves out layers that are not simply called: the head gets its weight from the first stage again.
    """

    def __init__(self, link: PipelineLayer, fill: Fill) -> None:
        super().__init__(_TIE, type(link.layer), forward_fn=link.call, tied_weight_attr="weight")
        self.link, self._fill = link, fill

    def build(self, log: bool = False) -> nn.Module:
        return self._fill(self.link)


class _PipelineModule(PipelineModule):  # type: ignore[misc]
    def __init__(self, layers: Sequence[LayerSpec], *, positions: PassPositions, **options: Any) -> None:
        super().__init__(layers, **options)
        self.positions = positions

    def forward(self, forward_input: Any) -> Any:
        """Pass the next micro-batch; DeepSpeed calls this once for each, in their order."""
        self.positions.advance()
        return super().forward(forward_input)

    def _count_layer_params(self) -> list[int]:
        """Count parameters without building layers, which would fill all of them on every rank."""
        return [sum(parameter.numel() for parameter in spec.link.layer.parameters()) for spec in self._layer_specs]


def build_pipeline_module(
    context: Context, *, device: torch.device, loss_of: LossOf
) -> tuple[PipelineModule, PreTrainedModel]:
    """Return this rank's stage, and the whole model with storage for that stage alone.

    Args:
        context: of this rank; its process group is there.
        device: where the model will run; it is not moved there.
        loss_of: logits (sequences, tokens, vocabulary) and labels to a scalar, on the last stage.

    Raises:
        ConfigError: the model is of a family that cannot be cut, or its weights do not fit.
    """
    run, parallel = context.run, context.run.parallel
    assert isinstance(parallel, DeepSpeedPipeline), "the run asks for this pipeline"
    heartbeat = partial(context.heartbeat.update, "load")
    model, builder = build_deferred(
        run.model,
        seed=run.job.seed,
        attention=run.attention,
        adapter=run.lora,
        heartbeat=heartbeat,
        on_progress=weights_progress(context),
    )
    apply_activation_checkpointing(model, run.activation)
    prepare_model(model, run, device=device)
    parts = dict(units(model))

    def fill(link: PipelineLayer) -> nn.Module:
        for name in link.parts:
            builder.build(name, parts[name])
            heartbeat()
        return link.layer

    positions = PassPositions()
    specs = [(_TiedLayer if link.is_tied else _Layer)(link, fill) for link in pipeline_layers(model, positions)]
    # it prints all layers, a line each, and broadcasts tied weights in place
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        staged = _PipelineModule(
            specs,
            positions=positions,
            num_stages=parallel.stages,
            loss_fn=loss_of,
            partition_method=_METHODS[parallel.partition],
            activation_checkpoint_interval=0,  # blocks recompute themselves
        )
    assert not any(tensor.is_meta for tensor in staged.state_dict().values()), "a layer was left on the meta device"
    torch.manual_seed(run.job.seed + staged.stage_id)  # of dropout: other stages draw other masks
    if context.is_main:
        print(f"pipeline: {_stages_text(staged.parts, specs)}", flush=True)
    return staged, model


def _stages_text(bounds: Sequence[int], specs: Sequence[Any]) -> str:
    """Return each stage's layers: ``Embedding Positions 2 Block | 2 Block LayerNorm Embedding``."""
    stages = []
    for first, end in pairwise(bounds):
        names = [spec.typename.__name__ for spec in specs[first:end]]
        counted = {name: names.count(name) for name in names}
        stages.append(" ".join(name if count == 1 else f"{count} {name}" for name, count in counted.items()))
    return " | ".join(stages)


def parameters_counted_here(staged: PipelineModule) -> list[nn.Parameter]:
    """Return the parameters of this stage without those that an earlier stage holds too."""
    return [parameter for parameter in staged.parameters() if not parameter.ds_pipe_replicated]
