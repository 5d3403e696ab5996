"""A model in stages on ranks of their own: the parts of a step flow through them, scores go to the first rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from launcher.engines.distributed import DTYPES
from launcher.engines.pipelining.build import cut_by_parameters
from launcher.engines.pipelining.cut import check_passes_on, count_own_blocks, cut
from launcher.models.build import lay_out
from launcher.serving.split import split
from launcher.serving.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from launcher.config import Run
    from launcher.serving.plan import StepPlan
    from launcher.serving.runner import Runner


def stage_model(
    run: Run, *, number: int, count: int, after: Callable[[str, nn.Module], None], beat: Callable[[], None]
) -> tuple[PreTrainedModel, Stage]:
    """Return one stage of a run's model with its weights; stages have about as many parameters each.

    Args:
        run: whose model.
        number: of the stage.
        count: of all stages.
        after: called with each part, and its name, as soon as it is there.
        beat: called while weights are fetched or drawn.

    Raises:
        ConfigError: the model cannot be cut, or has fewer blocks than stages.
        EnvironmentProblem: weights cannot be fetched.
    """
    compute = DTYPES[run.precision.compute]
    model, builder = lay_out(run.model, seed=run.job.seed, attention=run.attention, dtype=compute, beat=beat)
    blocks = cut_by_parameters(model, count, stages=count)[number]
    stage = Stage(number=number, count=count, first_block=blocks.start)
    cut(model, blocks, first=stage.first, last=stage.last)

    def then(name: str, part: nn.Module) -> None:
        after(name, part)
        beat()

    builder.build_all(then)
    count_own_blocks(model, blocks)
    if not stage.first:
        check_passes_on(model)
    return model, stage


class Staged:
    """Computes plans on all stages; every rank calls ``run`` with the same ones.

    Args:
        runner: of this rank's stage.
        group: of all stages, for tensors on CPUs; ranks are numbers of stages.
    """

    isolates = False
    """A step that fails here may not fail on the others."""

    def __init__(self, runner: Runner, group: dist.ProcessGroup) -> None:
        self._runner, self._group, self._stage = runner, group, runner.stage
        config = runner.model.config.get_text_config()
        self._width, self._vocab_size = config.hidden_size, config.vocab_size

    def run(self, plan: StepPlan) -> Tensor:
        """Return on the first rank the scores that are asked for; (wanted, vocabulary), fp32; on others nothing."""
        stage, model = self._stage, self._runner.model
        parts = split(plan, stage.count)
        # what waits to be taken stays alive here; nobody waits for a neighbour who waits for him
        under_way: list[tuple[dist.Work, Tensor]] = []
        for part in parts:
            hidden = None
            if not stage.first:
                tokens = sum(len(segment.tokens) for segment in part.segments) + part.padding
                hidden = torch.empty((1, tokens, self._width), dtype=model.dtype, device=model.device)
                dist.recv(hidden, stage.number - 1)
            made = self._runner.run(part, hidden).contiguous()
            if not stage.last:
                under_way.append((dist.isend(made, stage.number + 1), made))
            elif len(made):
                made = made.cpu()
                under_way.append((dist.isend(made, 0, group=self._group), made))
        scores = [self._scores(part) for part in parts] if stage.first else []
        for work, _ in under_way:
            work.wait()
        return torch.cat(scores).to(model.device) if scores else torch.empty(0)

    def _scores(self, part: StepPlan) -> Tensor:
        """Return what the last stage makes of a part."""
        room = torch.empty((sum(segment.wanted for segment in part.segments), self._vocab_size))
        if len(room):
            dist.recv(room, self._stage.count - 1, group=self._group)
        return room

    def close(self) -> None:
        """Let the model go."""
        self._runner.close()
