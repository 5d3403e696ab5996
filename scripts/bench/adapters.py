"""CPU seconds of decoding with LoRA adapters: the base model alone, against four adapters mixed in one batch.

Requests, prompts and tokens are the same. Weights and adapters are random: values do not matter to the time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from harness import alternate, print_machine
from safetensors.torch import save_file

from launcher.config.compose import compose
from launcher.config.inference import EngineLimits
from launcher.config.model.linear_layers import LinearSize, module_sizes
from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineRequest, InferenceEngine
from launcher.inference.engine.paged_engine import make_paged_engine


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()

    words = ["job=serve", f"model={options.model}", "model.weights=random", "job.tokenizer=bytes", "precision=bf16"]
    run = compose([*words, "backend.ranks=1", "tracker=local"]).run
    modules = module_sizes(run.model)
    assert modules is not None, "the sizes of this model do not decide its layers"
    limits = EngineLimits(max_num_seqs=options.requests, kv_cache_tokens=1 << 14, enable_prefix_caching=False)
    print_machine("torch", "transformers")
    with tempfile.TemporaryDirectory() as root:
        folders = {}
        for number in range(options.adapters):
            folders[f"adapter{number}"] = str(Path(root) / str(number))
            write_adapter(Path(root) / str(number), modules.linear, rank=options.rank, seed=number)
        plain = make_paged_engine(run, limits=limits, heartbeat=heartbeat, rank=0, world_size=1)
        adapted = make_paged_engine(run, limits=limits, heartbeat=heartbeat, adapters=folders, rank=0, world_size=1)

    def seconds(engine: InferenceEngine, names: list[str]) -> float:
        """Return the CPU seconds of a thousand generated tokens, prompts included."""
        for number in range(options.requests):
            prompt = tuple((7 * number + at) % 200 for at in range(options.prompt_tokens))
            sampling = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
            adapter = names[number % len(names)]
            engine.add(EngineRequest(id=str(number), prompt=prompt, sampling=sampling, adapter=adapter))
        started = time.process_time()
        while not engine.idle:
            engine.step()
        num_tokens: int = options.requests * options.tokens
        return 1000 * (time.process_time() - started) / num_tokens

    kinds: dict[str, Callable[[], float]] = {
        "base, engine without adapters": partial(seconds, plain, [""]),
        "base, engine with adapters": partial(seconds, adapted, [""]),
        f"{options.adapters} adapters mixed": partial(seconds, adapted, list(folders)),
        "base and adapters mixed": partial(seconds, adapted, ["", *folders]),
    }
    for measure in kinds.values():
        measure()
    alternate(kinds, rounds=options.rounds, unit="CPU s per 1,000 tokens")


def heartbeat() -> None:
    """Report no progress: nothing waits for it."""


def write_adapter(folder: Path, linear: Mapping[str, LinearSize], *, rank: int, seed: int) -> None:
    """Write a random adapter of all these layers, (out, in) each, as PEFT does."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in linear.items():
        for side, shape in (("A", (rank, size.inputs)), ("B", (size.outputs, rank))):
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = 0.01 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")


if __name__ == "__main__":
    main()
