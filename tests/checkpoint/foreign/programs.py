"""The programs whose checkpoints are read: each trains a tiny GPT-2, saves it as it does, and trains on.

    python programs.py FOLDER        with MASTER_ADDR set

Forked ranks write each folder; ``converted.pt`` is what DeepSpeed makes of one. ``losses.json`` has, by folder, the
losses of the two steps after saving. The second depends on the moments.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, TOKENS, SEQUENCES = 67, 12, 4
LR, DECAY = 1e-2, 0.1
SAVED_AT = 2


def config() -> GPT2Config:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 12, "n_positions": 16, "vocab_size": VOCABULARY}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(**sizes, **dropout, bos_token_id=None, eos_token_id=None)


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(config())


def tokens(step: int) -> torch.Tensor:
    """Return the batch of a step (0-based)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCABULARY, (SEQUENCES, TOKENS), generator=generator)


def groups(module: nn.Module) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in module.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in module.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(module), lr=LR)


def own(step: int) -> torch.Tensor:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return tokens(step)[rank * SEQUENCES // world : (rank + 1) * SEQUENCES // world]


def mean(loss: torch.Tensor) -> float:
    value = loss.detach().float()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def train(module: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = module(input_ids=own(step), labels=own(step)).loss
        loss.backward()
        if dist.is_initialized() and not hasattr(module, "set_requires_gradient_sync"):
            for parameter in module.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
    return losses


FIRST, AFTER = range(SAVED_AT), range(SAVED_AT, SAVED_AT + 2)


def deepspeed(folder: Path, *, stage: int, **options: Any) -> list[float]:
    import deepspeed as ds

    ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ds.init_distributed("gloo", verbose=False)
    module = model()
    settings = {
        "train_micro_batch_size_per_gpu": SEQUENCES // 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        **options,
    }
    engine, *_ = ds.initialize(model=module, optimizer=adamw(module), config=settings)

    def steps(which: range) -> list[float]:
        losses = []
        for step in which:
            loss = engine(input_ids=own(step), labels=own(step)).loss
            engine.backward(loss)
            engine.step()
            losses.append(mean(loss))
        return losses

    steps(FIRST)
    engine.save_checkpoint(str(folder))
    return steps(AFTER)


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = model()
    for block in module.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def accelerate_fsdp(folder: Path) -> list[float]:
    """Save what accelerate does of FSDP: two folders."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    module = sharded()
    optimizer = adamw(module)
    train(module, optimizer, FIRST)
    weights, moments = get_state_dict(module, optimizer)
    dcp.save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": moments}, checkpoint_id=folder / "optimizer_0")
    return train(module, optimizer, AFTER)


def torchtitan(folder: Path) -> list[float]:
    """Save what torchtitan does: weights at the top, a flat state of the optimizer, its own counts."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    module = sharded()
    optimizer = adamw(module)
    train(module, optimizer, FIRST)
    weights = get_model_state_dict(module)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    moments = get_optimizer_state_dict(module, optimizer, options=options)
    progress = {"step": torch.tensor(SAVED_AT, dtype=torch.int32), "ntokens_seen": torch.tensor(96)}
    state = {**weights, "optimizer": moments, "train_state": progress, "lr_scheduler": {"last_epoch": SAVED_AT}}
    dcp.save(state, checkpoint_id=folder)
    writer = HuggingFaceStorageWriter(path=f"{folder}_safetensors", save_distributed=True)
    del weights["lm_head.weight"]  # tied, which safetensors refuse
    dcp.save(weights, storage_writer=writer)
    return train(module, optimizer, AFTER)


def plain(folder: Path) -> list[float]:
    """Save the state that torch's own classes return, one file of pickled weights in two parts."""
    from torch.distributed import checkpoint as dcp

    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    train(module, optimizer, FIRST)
    weights = module.state_dict()
    dcp.save({"model": weights, "optimizer": optimizer.state_dict()}, checkpoint_id=f"{folder}_dcp")
    folder.mkdir()
    half = sorted(weights)[::2]
    parts = [{name: weights[name] for name in half}, {name: weights[name] for name in weights if name not in half}]
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    places = {}
    for name, part in zip(names, parts, strict=True):
        torch.save({key: value.clone() for key, value in part.items()}, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    return train(module, optimizer, AFTER)


def accelerate(folder: Path) -> list[float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    module = model()
    prepared, optimizer = accelerator.prepare(module, adamw(module))
    train(prepared, optimizer, FIRST)
    accelerator.save_state(str(folder))
    return train(prepared, optimizer, AFTER)


def trainer(folder: Path) -> list[float]:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for step in FIRST for row in tokens(step)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=SAVED_AT,
        save_steps=SAVED_AT,
        per_device_train_batch_size=SEQUENCES,
        learning_rate=LR,
        weight_decay=DECAY,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    made = Trainer(model=model(), args=arguments, train_dataset=data)
    made.train()
    for group in made.optimizer.param_groups:
        group["lr"] = LR
    made.model.zero_grad()
    return train(made.model, made.optimizer, AFTER)


CASES: dict[str, tuple[int, Callable[[Path], list[float]]]] = {
    "zero1": (2, lambda folder: deepspeed(folder, stage=1)),
    "zero2_bf16": (2, lambda folder: deepspeed(folder, stage=2, bf16={"enabled": True})),
    "zero3": (2, lambda folder: deepspeed(folder, stage=3)),
    "zero0": (1, lambda folder: deepspeed(folder, stage=0)),
    "accelerate_fsdp": (2, accelerate_fsdp),
    "titan": (2, torchtitan),
    "plain": (1, plain),
    "accelerate": (1, accelerate),
    "trainer": (1, trainer),
}
"""Number of ranks and program of each folder."""


def main(folder: Path) -> None:
    import accelerate as _accelerate  # noqa: F401  (once, before forking)
    import deepspeed as _deepspeed  # noqa: F401

    losses = {}
    for number, (name, (world, program)) in enumerate(CASES.items()):
        port = int(os.environ["MASTER_PORT"]) + number
        children = [fork(folder, name, rank, world, port, program) for rank in range(world)]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if any(statuses):
            raise SystemExit(f"{name} failed")
        losses[name] = json.loads((folder / f"{name}.json").read_text())
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    converted = get_fp32_state_dict_from_zero_checkpoint(str(folder / "zero2_bf16"))
    torch.save(dict(converted), folder / "converted.pt")
    (folder / "losses.json").write_text(json.dumps(losses))


def fork(folder: Path, name: str, rank: int, world: int, port: int, program: Callable[[Path], list[float]]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        torch.set_num_threads(1)
        if world > 1:
            dist.init_process_group("gloo")
        if world == 1 and not name.startswith("zero"):
            for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                del os.environ[key]
        losses = program(folder / name)
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(losses))
        code = 0
    finally:
        if code:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
