"""Decoding with 2:4 matrices that are stored without their zeros, against the same matrices stored whole.

Weights are random and pruned by magnitude, two of each four inputs of the matrices in blocks: values do not matter to
the time. Both engines generate the same tokens, which is checked. The kernels are those of the machine's instructions,
or of fewer ones: CC='gcc -mno-avx512f' leaves AVX2.

Rates are per CPU second, so that other work on the machine matters less; threads that wait for each other count too:

    OMP_NUM_THREADS=1 python scripts/bench/sparse_decoding.py --formats bf16 --batches 1 8 --rounds 3
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from harness import alternate, print_machine
from transformers import PreTrainedModel

from launcher.config.compose import compose
from launcher.config.inference import EngineLimits
from launcher.config.quantization import METHODS
from launcher.config.sampling import SamplingParams
from launcher.engines.kept_zeros import linear_matrices
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.model_loader import load_model
from launcher.inference.engine.paged_engine import PagedEngine, paged_engine_for
from launcher.inference.kernels.native import native_library
from launcher.quantization.codecs import codec_of
from launcher.quantization.layers import replace_layer

FORMATS = ("fp32", "bf16", "int8_weight")
INSTRUCTIONS = {32: "AVX512", 16: "AVX2", 8: "no more than the compiler's default"}
"""By the outputs in a panel."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()

    print_machine("torch", "transformers")
    print(f"kernels: {INSTRUCTIONS[native_library().native_panel()]}; {torch.get_num_threads()} threads", flush=True)
    ratios = []
    for name in options.formats:
        model = pruned_model(options.model, name)
        engines = {kind: engine_of(copy.deepcopy(model), options, kind) for kind in ("dense", "packed")}
        for batch in options.batches:
            print(f"{name}, {batch} at a time")
            found: dict[str, list[list[int]]] = {}
            for part, number in (("decode", 1), ("prefill", 0)):
                variants: dict[str, Callable[[], float]] = {
                    kind: partial(rate, engine, batch, options, part=number, found=found, kind=kind)
                    for kind, engine in engines.items()
                }
                for measure in variants.values():
                    measure()
                medians = alternate(variants, rounds=options.rounds, unit=f"tokens per CPU second, {part}")
                ratios.append((name, batch, part, medians))
            assert found["dense"] == found["packed"], "packed matrices gave other tokens"
    print("| format | requests | part | dense | packed | ratio |\n|---|---|---|---|---|---|")
    for name, batch, part, medians in ratios:
        dense, packed = medians["dense"], medians["packed"]
        print(f"| {name} | {batch} | {part} | {dense:.1f} | {packed:.1f} | {packed / dense:.2f} |")


def pruned_model(name: str, form: str) -> PreTrainedModel:
    """Return a model of random weights with 2:4 matrices, in one of the formats."""
    precision = "fp32" if form == "fp32" else "bf16"
    words = ["job=serve", f"model={name}", "model.weights=random", "job.tokenizer=bytes", f"precision={precision}"]
    run = compose([*words, "backend.ranks=1", "tracker=local"]).run
    model = load_model(run, device=torch.device("cpu"))
    for matrix in linear_matrices([model]).values():
        groups = matrix.data.unflatten(1, (-1, 4))
        groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0.0)
    if form in METHODS:
        codec = codec_of(METHODS[form]())
        for matrix_name in list(linear_matrices([model])):
            path = matrix_name.removesuffix(".weight")
            replace_layer(model, path, codec.quantize(model.get_submodule(path)))
    return model


def engine_of(model: PreTrainedModel, options: argparse.Namespace, kind: str) -> PagedEngine:
    """Return an engine that stores matrices packed or dense."""
    most = max(options.batches)
    limits = EngineLimits(
        max_num_seqs=most,
        enable_prefix_caching=False,
        kv_cache_tokens=most * (options.prompt_tokens + options.tokens + 64),
        prefill_chunk_size=most * options.prompt_tokens,
        sparse_kernels=kind == "packed",
    )
    return paged_engine_for(model, limits=limits, eos_token_ids=())


def rate(
    engine: PagedEngine,
    batch: int,
    options: argparse.Namespace,
    *,
    part: int,
    found: dict[str, list[list[int]]],
    kind: str,
) -> float:
    """Return tokens a CPU second of prompts (part 0) or of generated tokens (part 1), of all requests together."""
    sampling = SamplingParams(max_tokens=options.tokens + 1, ignore_eos=True)
    for number in range(batch):
        prompt = tuple((7 * number + 13 * at) % 251 for at in range(options.prompt_tokens))
        engine.add(EngineRequest(id=str(number), prompt=prompt, sampling=sampling))
    tokens: list[list[int]] = [[] for _ in range(batch)]
    times = [time.process_time()]
    while not engine.idle:
        for output in engine.step():
            tokens[int(output.request_id)] += [token.id for token in output.tokens]
        times.append(time.process_time())
    found[kind] = tokens
    num_tokens: int = batch * (options.tokens if part else options.prompt_tokens)
    return num_tokens / (times[-1] - times[1] if part else times[1] - times[0])


if __name__ == "__main__":
    main()
