"""What a finished training run leaves for people: a sample of its text and a picture of its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.files import write_atomic
from launcher.training.curve import draw_curve

if TYPE_CHECKING:
    from launcher.data.open import Splits
    from launcher.engines.base import Engine
    from launcher.jobs.train import Train
    from launcher.training.loop import Trainer


def finish(trainer: Trainer) -> None:
    """Generate on every rank; on rank 0 write sample.txt and loss.png."""
    job, context, splits, clock = trainer.job, trainer.context, trainer.splits, trainer.clock
    if job.sample_tokens and splits.tokenizer is not None:
        with clock.phase("sample"):
            text = sample(job, splits, trainer.engine)
        if context.is_main:
            write_atomic(context.run_dir.sample, text + "\n")
            print(f"sample: {text!r}", flush=True)
    if context.is_main:
        with clock.phase("curve"):
            draw_curve(context.run_dir.metrics, context.run_dir.curve, baselines=splits.baselines)
        print(f"loss curve: {context.run_dir.curve}", flush=True)


def sample(job: Train, splits: Splits, engine: Engine) -> str:
    """Return the prompt and its greedy continuation; every rank must call it."""
    import torch

    assert splits.tokenizer is not None, "no tokenizer, no text"
    ids = splits.tokenizer.encode(job.sample_prompt) or [0]
    room = max(1, splits.context - job.sample_tokens)
    prompt = torch.tensor([ids[-room:]], device=engine.device)
    answer = engine.generate(prompt, max_new_tokens=min(job.sample_tokens, splits.context - 1))
    return str(splits.tokenizer.decode(answer[0].tolist()))
