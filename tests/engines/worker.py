"""The ranks of the engine tests: forked after the slow imports, they take cases from a file, each in another fork.

    python worker.py CASES.json OUTPUT_FOLDER      with MASTER_ADDR set

A case is a mapping: name, port, world, steps, and what ``make_run`` overlays on its defaults; ``family: llama`` trains
another model, ``plant`` names an error of ``plants.py``, ``documents`` says what a row holds.
``zeros`` is the file whose zeros are counted in the end; ``save`` is a folder and ``load`` one or several: ``after``,
``after1`` and so on are the steps taken after each. Each rank writes ``<name>.<rank>.json``. A case takes as many
ranks as its ``world``, from the first on. What a rank prints is in ``log.<rank>``; when one fails the whole
process group is killed.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

TOKENS, VOCABULARY, GLOBAL_BATCH = 32, 256, 16
AFTER = range(100, 103)
"""Steps taken after saving, and after loading."""

SLOW_IMPORTS = (
    "launcher.engines.pipeline.engine",
    "launcher.engines.torch",
    "launcher.profiling.profiler",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "transformers.generation.utils",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)


class QuietClock:
    """Times nothing."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield


COMPILER = "torch._inductor.compile_fx"
"""Takes a second, and only where some case compiles or is DeepSpeed's."""

DEEPSPEED_IMPORTS = (
    "launcher.utils.deepspeed_library",
    "launcher.engines.deepspeed.zero",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.zero.stage3",
)
"""Only where some case is DeepSpeed's."""


def make_run(case: dict[str, Any], weights: dict[str, str]) -> Any:
    from launcher.config.build import build_run, with_defaults

    tree = {
        "job": {
            "kind": "train",
            "micro_batch": 8,
            "gradient_accumulation_steps": 1,
            "sequence_length": TOKENS,
            "clip_norm": 1.0,
        },
        "model": {
            "kind": "gpt2",
            "name": "tiny",
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "hidden_size": 64,
            "max_position_embeddings": TOKENS,
            "vocab_size": VOCABULARY,
            "weights": weights["gpt2"],
        },
        "data": {"kind": "synthetic"},
        "parallel": {"kind": "single"},
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "schedule": {"kind": "constant"},
        "precision": {"kind": "fp32"},
        "activation": {"kind": "none"},
        "attention": {"kind": "sdpa"},
        "compile": {"kind": "false"},
        "benchmark": {"kind": "none"},
        "quantization": {"kind": "none"},
        "sparsity": {"kind": "none"},
        "adapter": {"kind": "none"},
        "deploy": {"kind": "none"},
        "profile": {"kind": "false"},
        "checkpoint": {"kind": "policy"},
        "tracker": {"kind": "local"},
        "backend": {"kind": "local"},
        "run": {},
    }
    if case.get("family") == "llama":
        tree["model"] = {"kind": "hf", "name": weights["llama"], "weights": "pretrained"}
    for group, values in case.get("run", {}).items():
        tree[group] = {**tree[group], **values}
    mistakes: list[Exception] = []
    run = build_run(with_defaults(tree), mistakes.append)
    assert run is not None, mistakes
    return run


def make_context(case: dict[str, Any], weights: dict[str, str], output: Path, rank: int) -> Any:
    from launcher.engines.context import Context
    from launcher.protocol.rundir import RunDir

    return Context(
        run=make_run(case, weights),
        run_dir=RunDir(output / case["name"]),
        rank=rank,
        local_rank=rank,
        world_size=case["world"],
        heartbeat=SimpleNamespace(update=lambda *args, **numbers: None),
    )


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels of a step; sequences differ in how many of their labels count."""
    generator = torch.Generator().manual_seed(step)
    steps = torch.randint(1, 4, (GLOBAL_BATCH, TOKENS + 1), generator=generator)
    sequences = steps.cumsum(dim=1) % VOCABULARY
    inputs, labels = sequences[:, :-1], sequences[:, 1:].clone()
    for number in range(GLOBAL_BATCH):
        labels[number, : number % 5 * 4] = -100
    return inputs, labels


def document_starts(row: int, step: int) -> list[int]:
    """Return where the three documents of a packed row begin, and where the last one ends."""
    return [0, 1 + (row + step) % 7, 16 + row * 3 % 11, TOKENS]


def apart(inputs: torch.Tensor, labels: torch.Tensor, step: int) -> list[Any]:
    """Return the documents of packed rows, each in a row of its own."""
    from launcher.data.dataloader import MicroBatch
    from launcher.data.rows import IGNORE_INDEX

    shape = (3 * len(inputs), TOKENS)
    ids, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    for row in range(len(inputs)):
        for number, (start, end) in enumerate(itertools.pairwise(document_starts(row, step))):
            ids[3 * row + number, : end - start] = inputs[row, start:end]
            targets[3 * row + number, : end - start - 1] = labels[row, start : end - 1]
    return [MicroBatch(input_ids=ids, labels=targets)]


def positions_of(labels: torch.Tensor, step: int) -> torch.Tensor:
    """Return the positions of packed rows, and take the label off the last token of each document."""
    positions = torch.empty(GLOBAL_BATCH, TOKENS, dtype=torch.int64)
    for row in range(GLOBAL_BATCH):
        for start, end in itertools.pairwise(document_starts(row, step)):
            positions[row, start:end] = torch.arange(end - start)
            labels[row, end - 1] = -100
    return positions


def micro_batches(context: Any, step: int, documents: str = "whole") -> list[Any]:
    """Return this rank's share of a step.

    Args:
        context: of the rank.
        step: of training.
        documents: ``whole`` rows of one document, rows of several (``packed``), or those in rows of their own
            (``apart``), all of them in one micro-batch; ``leaking`` are packed ones without their positions.
    """
    from launcher.data.dataloader import MicroBatch

    inputs, labels = global_batch(step)
    if documents == "apart":
        return apart(inputs, labels, step)
    positions = None if documents == "whole" else positions_of(labels, step)
    if documents == "leaking":
        positions = None
    share = GLOBAL_BATCH // context.dims.data_parallel
    first = context.data_rank * share
    places = range(first, first + share)
    return [
        MicroBatch(
            input_ids=inputs[part],
            labels=labels[part],
            position_ids=None if positions is None else positions[part],
            drawn=GLOBAL_BATCH * step + torch.tensor(part),
            step=step,
        )
        for part in (
            list(places[at : at + context.batch.micro_batch]) for at in range(0, share, context.batch.micro_batch)
        )
    ]


def digests(engine: Any) -> dict[str, str]:
    """Return a digest of each weight on this rank, by its name in the whole model."""
    return {
        name.partition("model.")[2]: hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()
        for name, weight in engine.module.named_parameters(remove_duplicate=False)
        if type(weight.data) is torch.Tensor
    }


def report_zeros(engine: Any) -> str:
    from launcher.training.kept_zeros import report_kept_zeros

    return report_kept_zeros(engine)


def count_zeros(engine: Any, file: str) -> dict[str, tuple[int, int]]:
    """Return, of each linear layer's matrix here, how many zeros a file has, and how many are none any more."""
    from safetensors.torch import load_file

    stored, names = load_file(file), engine.linear_matrices().keys()
    zeros = {name: (stored[name] == 0, weight) for name, weight in engine.weights() if name in names}
    return {name: (int(mask.sum()), int((weight[mask] != 0).sum())) for name, (mask, weight) in zeros.items()}


def train(engine: Any, context: Any, steps: range, lr: float, documents: str = "whole") -> list[dict[str, Any]]:
    results = []
    for step in steps:
        result = engine.step(micro_batches(context, step, documents), lr=lr)
        results.append({name: getattr(result, name) for name in type(result).__dataclass_fields__})
    return results


def run_case(case: dict[str, Any], weights: dict[str, str], output: Path, rank: int) -> dict[str, Any]:
    """Train; where the case says so, save in between, continue in a second engine, and evaluate and generate."""
    from launcher.engines.base import make_engine

    if case.get("plant"):
        getattr(importlib.import_module("plants"), case["plant"])()
    context = make_context(case, weights, output, rank)
    lr, steps, answer = case.get("lr", 3e-3), case["steps"], {}
    with make_engine(context, QuietClock()) as engine:
        documents = case.get("documents", "whole")
        answer["held_out"] = engine.loss_of(micro_batches(context, 1000, documents)[: case.get("held_out", 1)])
        if case.get("zeros"):
            answer["report"] = report_zeros(engine)
        answer["steps"] = train(engine, context, range(steps), lr, documents)
        if case.get("digests"):
            answer["digests"] = digests(engine)
        if case.get("generate"):
            prompt = torch.arange(4).unsqueeze(0)
            answer["generated"] = engine.generate(prompt, max_new_tokens=5).tolist()
        if case.get("alone"):
            with engine.whole_model() as whole, torch.no_grad():
                if rank == 0:  # no other rank is needed
                    answer["alone"] = whole.module(input_ids=torch.arange(6).unsqueeze(0)).logits[0, -1].tolist()
        if case.get("save"):
            Path(case["save"]).mkdir(exist_ok=True)
            engine.save(Path(case["save"]))
            answer["after"] = train(engine, context, AFTER, lr)
        for number, folder in enumerate([case["load"]] if isinstance(case.get("load"), str) else case.get("load", [])):
            engine.load(Path(folder))
            answer[f"after{number or ''}"] = train(engine, context, AFTER, lr)
        answer["scalars"] = engine.scalars()
        if case.get("zeros"):
            answer["zeros"] = count_zeros(engine, case["zeros"])
    return answer


def main(cases_file: str, output: str) -> None:
    given = json.loads(Path(cases_file).read_text())
    kinds = {case["run"]["parallel"]["kind"] for case in given["cases"]}
    is_deepspeed = bool(kinds & {"zero", "deepspeed_pipeline"})
    compiles = is_deepspeed or any(case["run"].get("compile") for case in given["cases"])
    for name in (*SLOW_IMPORTS, *([COMPILER] if compiles else [])):  # once, before forking
        importlib.import_module(name)
    for name in DEEPSPEED_IMPORTS if is_deepspeed else ():
        with suppress(ModuleNotFoundError):  # of another version
            importlib.import_module(name)
    for case in given["cases"]:  # what the configuration imports
        make_context(case, given["weights"], Path(output), rank=0)
    for family in {case.get("family", "gpt2") for case in given["cases"]}:
        warm_up(family, given["weights"], Path(output))
    gc.freeze()  # else every collection in a child touches, and so copies, all that was imported

    ranks = set()
    for rank in range(max(case["world"] for case in given["cases"])):
        child = os.fork()
        if child == 0:
            in_child(lambda rank=rank: take_cases(given, Path(output), rank))
        ranks.add(child)
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if status:
            os.killpg(os.getpgrp(), signal.SIGKILL)  # the others wait for it, in children of their own


def warm_up(family: str, weights: dict[str, str], output: Path) -> None:
    """Build a model once before forking: what torch and Transformers keep then is a fifth of a small case."""
    from launcher.engines.model import build_run_model

    case = {"name": "warm_up", "world": 1, "family": family if family in weights else "gpt2", "run": {}}
    build_run_model(make_context(case, weights, output, rank=0), device=torch.device("cpu"))


def take_cases(given: dict[str, Any], output: Path, rank: int) -> None:
    """Be a rank: one case after the other, each in a child."""
    log = os.open(output / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for case in given["cases"]:
        if rank >= case["world"]:
            continue
        child = os.fork()
        if child == 0:
            in_child(lambda case=case: answer_case(case, given["weights"], output, rank))
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"case {case['name']} failed on rank {rank}")


def answer_case(case: dict[str, Any], weights: dict[str, str], output: Path, rank: int) -> None:
    os.environ |= {"RANK": str(rank), "MASTER_PORT": str(case["port"]), "WORLD_SIZE": str(case["world"])}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_SIZE": str(case["world"])}
    answer = run_case(case, weights, output, rank)
    (output / f"{case['name']}.{rank}.json").write_text(json.dumps(answer))


def in_child(do: Callable[[], None]) -> NoReturn:
    """End the forked process with what ``do`` comes to, and with nothing that its parent would do at its end."""
    code = 0
    try:
        do()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
