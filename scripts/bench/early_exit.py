"""Drafts by early exit: acceptance and share of layers by exit, and tokens/s beside no drafts, in turn.

Run it on weights as they are published, and on a run of ``+exp=early_exit_smollm2``: ``--weights RUN``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pydoc_data.topics
import time
from collections.abc import Callable
from functools import partial

from harness import alternate, print_machine

from launcher.config.compose import compose
from launcher.config.data.chat_tasks import NUM_CHATS, chat_tasks
from launcher.config.inference import EngineLimits
from launcher.config.prompt_file import SAMPLE_PROMPTS
from launcher.config.sampling import SamplingParams
from launcher.execution.run_references import resolve_run_references
from launcher.inference.engine.base import EngineRequest, EngineStats
from launcher.inference.engine.paged_engine import PagedEngine, make_paged_engine
from launcher.inference.tokenizer import open_tokenizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--exits", type=int, nargs="*", default=[4, 8, 12, 16, 20, 24])
    parser.add_argument("--exit", type=int, default=10, help="of the comparison of speeds")
    parser.add_argument("--drafts", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", choices=("sample", "tasks", "docs"), default="sample")
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    words = ["job=serve", f"model.weights={options.weights}", f"precision={options.precision}", "tracker=local"]
    words += ["model=smollm2_135m"] if options.weights == "pretrained" else []
    run = resolve_run_references(compose([*words, "backend.ranks=1", "parallel=single"]))
    tokenizer = open_tokenizer("model", run, heartbeat=heartbeat)
    if options.prompts == "docs":
        text = "".join(pydoc_data.topics.topics.values())
        starts = range(int(0.96 * len(text)), len(text) - 200, 1000)
        prompts = [tuple(tokenizer.encode(text[start : start + 100])) for start in starts]
    else:
        prompts = [tuple(tokenizer.encode(tokenizer.render(chat), special=False)) for chat in chats(options.prompts)]
    print_machine("torch", "transformers")

    def engine(**limits: object) -> PagedEngine:
        sizes = EngineLimits(kv_cache_tokens=1 << 14, enable_prefix_caching=False, **limits)  # type: ignore[arg-type]
        made = make_paged_engine(run, limits=sizes, rank=0, world_size=1, heartbeat=heartbeat)
        assert isinstance(made, PagedEngine)
        return made

    def tokens_per_s(made: PagedEngine, streams: int) -> float:
        for number, prompt in enumerate(prompts if streams > 1 else prompts[:6]):
            made.add(EngineRequest(id=str(number), prompt=prompt, sampling=SamplingParams(max_tokens=options.tokens)))
        before, started = made.stats().generated_tokens_total, time.perf_counter()
        while not made.idle:
            made.step()
        return (made.stats().generated_tokens_total - before) / (time.perf_counter() - started)

    print(f"weights: {options.weights}; prompts: {len(prompts)} of {options.prompts}, greedy")
    print(f"drafts of {options.drafts} tokens")
    print("| exit after layer | drafted tokens accepted | tokens a step | layers run for a token |")
    print("|---|---|---|---|")
    for exit_layer in options.exits:
        made = engine(
            speculation="early_exit",
            speculation_layers=exit_layer,
            speculation_tokens=options.drafts,
            speculation_adaptive=False,
        )
        tokens_per_s(made, len(prompts))
        print(f"| {exit_layer} | {row(made.stats())} |", flush=True)
        made.close()
    drafting = {"speculation": "early_exit", "speculation_layers": options.exit, "speculation_tokens": options.drafts}
    for streams in options.streams:
        engines = {
            "no drafts": engine(max_num_seqs=streams),
            f"drafts, exit {options.exit}": engine(max_num_seqs=streams, speculation_adaptive=False, **drafting),
            "adaptive": engine(max_num_seqs=streams, **drafting),
        }
        kinds: dict[str, Callable[[], float]] = {
            f"{streams} streams, {name}": partial(tokens_per_s, made, streams) for name, made in engines.items()
        }
        for measure in kinds.values():
            measure()
        alternate(kinds, rounds=options.rounds, unit="tokens/s")
        for made in engines.values():
            made.close()


def chats(name: str) -> list[list[dict[str, str]]]:
    """Return conversations that wait for an answer."""
    if name == "tasks":  # the last ones of the chats that +exp=early_exit_smollm2 trains on, held out
        return [chat["messages"][:1] for chat in itertools.islice(chat_tasks(), NUM_CHATS - 32, NUM_CHATS)]
    lines = [json.loads(line) for line in SAMPLE_PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [line.get("messages") or [{"role": "user", "content": line["prompt"]}] for line in lines]


def row(stats: EngineStats) -> str:
    """Return the cells of an engine."""
    steps = stats.decoded_tokens_total - stats.accepted_tokens_total
    return f"{stats.acceptance:.1%} | {stats.decoded_tokens_total / steps:.2f} | {stats.layer_share:.2f}"


def heartbeat() -> None:
    """Report no progress: nothing waits for it."""


if __name__ == "__main__":
    main()
