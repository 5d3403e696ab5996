"""Speed of the generation engine against Transformers in the same process, alternately, on the same prompts.

    .venv/bin/python scripts/bench/serving_engine.py --at 1 8 32 --rounds 2
    .venv/bin/python scripts/bench/serving_engine.py --at 16 --context 512 --contenders paged continuous

Seconds are of the processor, of this process alone: on a shared machine the clock on the wall measures the neighbours.
With one thread, which is the default, both are the same on a machine that is free.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import print_machine

from launcher.config.compose import compose
from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.model_loader import load_model
from launcher.inference.engine.paged_engine import paged_engine_for

Work = Sequence[tuple[tuple[int, ...], int]]
"""Prompts, and how many tokens follow each."""


def work(num: int, *, context: int, seed: int) -> Work:
    """Return requests of mixed lengths: prompts of ``context`` to twice as many tokens, 8 to 32 tokens of output."""
    rng = random.Random(seed)
    return [
        (tuple(rng.randrange(10, 40_000) for _ in range(rng.randint(context, 2 * context))), rng.randint(8, 32))
        for _ in range(num)
    ]


def one_by_one(model: Any, todo: Work) -> None:
    """``generate`` for each."""
    for prompt, num in todo:
        _generate(model, [prompt], num)


def static(model: Any, todo: Work) -> None:
    """``generate`` for eight at a time, padded on the left, until the longest ends."""
    for start in range(0, len(todo), 8):
        batch = todo[start : start + 8]
        _generate(model, [prompt for prompt, _ in batch], max(num for _, num in batch))


def _generate(model: Any, prompts: Sequence[tuple[int, ...]], num: int) -> None:
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generate(ids, attention_mask=mask, max_new_tokens=num, min_new_tokens=num, do_sample=False, pad_token_id=2)


def continuous(model: Any, todo: Work) -> None:
    """Transformers' continuous batching, with as much room as the work needs."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    # one length of output for all, as favourable as it can be: none waits for a longer one
    num = round(statistics.mean(num for _, num in todo))
    room = sum(len(prompt) + num for prompt, _ in todo) // 32 + 2 * len(todo)
    config = ContinuousBatchingConfig(num_blocks=room, page_size=32, max_batch_tokens=512)
    way = GenerationConfig(max_new_tokens=num, do_sample=False, eos_token_id=-1, pad_token_id=2)
    model.generate_batch([list(p) for p, _ in todo], generation_config=way, continuous_batching_config=config)


def paged(engine: Any, todo: Work) -> None:
    """The launcher's engine."""
    for index, (prompt, num) in enumerate(todo):
        engine.add(
            EngineRequest(id=str(index), prompt=prompt, sampling=SamplingParams(max_tokens=num, ignore_eos=True))
        )
    while not engine.idle:
        engine.step()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="requests at a time")
    parser.add_argument("--context", type=int, default=20, help="shortest prompt; the longest has twice as many")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--overrides", nargs="*", default=["model=smollm2_135m", "precision=bf16"])
    names = ["paged", "one by one", "static", "continuous"]
    parser.add_argument("--contenders", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    print_machine("torch", "transformers")
    torch.set_num_threads(options.threads)
    run = compose([*options.overrides, "job=evaluate", "data=synthetic"]).run
    model = load_model(run, device=torch.device("cpu"))
    engine = paged_engine_for(
        copy.deepcopy(model),
        limits=EngineLimits(enable_prefix_caching=False, kv_cache_tokens=1 << 16),
        eos_token_ids=(),
    )
    contenders: dict[str, Callable[[Work], None]] = {
        "paged": lambda todo: paged(engine, todo),
        "one by one": lambda todo: one_by_one(model, todo),
        "static": lambda todo: static(model, todo),
        "continuous": lambda todo: continuous(copy.deepcopy(model), todo),
    }
    for num in options.at:
        rates: dict[str, list[float]] = {name: [] for name in options.contenders}
        for turn in range(options.rounds):
            todo = work(num, context=options.context, seed=turn)
            for name in options.contenders:
                begun_s = time.process_time()
                contenders[name](todo)
                rates[name].append(sum(tokens for _, tokens in todo) / (time.process_time() - begun_s))
        middle = {name: round(statistics.median(found), 2) for name, found in rates.items()}
        print(json.dumps({"requests": num, "context": options.context, "tokens_per_cpu_s": middle}), flush=True)


if __name__ == "__main__":
    main()
