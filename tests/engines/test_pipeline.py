"""Pipelines take the same steps as one process: every schedule, GPT-2 (tied embeddings) and Llama, in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import losses

STEPS = 5
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
STAGES = (2, 4)
LAYERS = 8  # two chunks on each of four ranks
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES = ("gpt2", "llama", "files")
MATRIX = [f"gpt2_{stages}_{schedule}" for stages in STAGES for schedule in SCHEDULES]
OTHERS = {
    "llama_2_zbv": {"family": "llama", "parallel": {"stages": 2, "schedule": "zbv"}},
    "llama_4_1f1b": {"family": "llama", "parallel": {"stages": 4}},
    "llama_4_interleaved_zero_bubble": {
        "family": "llama",
        "parallel": {"stages": 4, "schedule": "interleaved_zero_bubble"},
    },
    "data_replicate": {"world": 4, "parallel": {}},
    "data_replicate_zbv": {"world": 4, "parallel": {"schedule": "zbv"}},
    "data_shard_gpipe": {"world": 4, "parallel": {"data": "shard", "schedule": "gpipe"}},
    "data_shard": {"world": 4, "parallel": {"data": "shard"}},
    "data_shard_zbv": {"world": 4, "parallel": {"data": "shard", "schedule": "zbv"}},
    "llama_data_shard": {
        "family": "llama",
        "world": 4,
        "parallel": {"data": "shard", "schedule": "interleaved_zero_bubble"},
    },
    "recomputed_gpipe": {"parallel": {"schedule": "gpipe"}, "activation": {"kind": "full"}},
    "recomputed_1f1b": {"parallel": {}, "activation": {"kind": "full"}},
    "recomputed_zbv": {"parallel": {"schedule": "zbv"}, "activation": {"kind": "full"}},
    "recomputed_interleaved_zero_bubble": {
        "parallel": {"schedule": "interleaved_zero_bubble"},
        "activation": {"kind": "full"},
    },
    "splits_2x8": {"parallel": {}, "job": {"micro_batch": 2, "gradient_accumulation_steps": 8}},
    "splits_8x2": {"parallel": {}, "job": {"micro_batch": 8, "gradient_accumulation_steps": 2}},
    "files_2_1f1b": {"family": "files", "parallel": {}},
    "by_time": {"parallel": {"balance": "time"}},
}
HALF = {
    "bf16": {"parallel": {}, "precision": {"kind": "bf16"}},
    "fp16": {"parallel": {"schedule": "zbv"}, "precision": {"kind": "fp16"}, "activation": {"kind": "full"}},
}
PLANTED = {
    "tied_gradients_are_not_summed": {"parallel": {}},
    "tied_copies_count_twice": {"parallel": {}},
    "pipelines_side_by_side_keep_their_gradients": {"world": 4, "parallel": {}},
    "gradients_of_shards_are_not_scaled": {"world": 4, "parallel": {"data": "shard"}},
    "micro_batches_are_swapped": {"parallel": {}},
}


def case(name: str, folder: Path, *, world: int | None = None, family: str = "gpt2", **rest: Any) -> dict[str, Any]:
    parallel = {"kind": "pipeline", **rest.pop("parallel")}
    run = {group: rest.pop(group) for group in ("activation", "precision") if group in rest}
    world = world or parallel.get("stages", 2)
    side_by_side = max(1, world // parallel.get("stages", 2))
    job = {"micro_batch": 4 // side_by_side, "gradient_accumulation_steps": 4, **rest.pop("job", {})}
    models = {
        "gpt2": {"num_hidden_layers": LAYERS, "hidden_size": 32, "weights": "random"},
        "llama": {"name": str(folder / "llama"), "weights": "random"},
        "files": {},  # GPT-2 from safetensors, where tied weights stand once
    }
    run |= {"parallel": parallel, "job": job, "model": models[family]}
    return {
        "name": name,
        "world": world,
        "steps": STEPS,
        "generate": "plant" not in rest,
        "family": family,
        "run": run,
        **rest,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture(scope="module")
def answers(run_cases: Any, folder: Path) -> dict[str, Any]:
    """Run all cases of this module on the same four processes."""
    cases = []
    for family in FAMILIES:
        one = case(
            family,
            folder,
            world=1,
            family=family,
            parallel={},
            job={"micro_batch": 16, "gradient_accumulation_steps": 1},
        )
        one["run"]["parallel"] = {"kind": "single"}
        cases += [one, {**one, "name": f"{family}_learning", "steps": 10, "generate": False}]
    for name in MATRIX:
        _, stages, schedule = name.split("_", 2)
        saving = {"save": str(folder / "saved")} if name == "gpt2_2_1f1b" else {}
        parallel = {"stages": int(stages), "schedule": schedule}
        cases.append(case(name, folder, parallel=parallel, digests=True, **saving))
    saved = {"load": str(folder / "saved"), "steps": 0}
    cases.append(case("resumed", folder, parallel={}, **saved))
    cases.append(case("resumed_in_a_v", folder, parallel={"stages": 4, "schedule": "zbv"}, **saved))
    cases.append(case("resumed_in_shards", folder, world=4, parallel={"data": "shard", "schedule": "zbv"}, **saved))
    cases += [case(name, folder, **rest) for name, rest in {**OTHERS, **HALF}.items()]
    cases += [case(name, folder, plant=name, steps=4, **rest) for name, rest in PLANTED.items()]
    return run_cases(cases, folder)


def single(answers: dict[str, Any], name: str) -> Any:
    """Return what one process found for the same model."""
    return answers[next((family for family in ("llama", "files") if name.startswith(family)), "gpt2")]


def norms(answer: Any) -> list[float]:
    return [step["grad_norm"] for step in answer["steps"]]


def same(answer: Any, reference: Any) -> bool:
    steps = len(losses(answer))
    equal = losses(answer) == pytest.approx(losses(reference)[:steps], rel=1e-5)
    return equal and norms(answer) == pytest.approx(norms(reference)[:steps], rel=1e-4)


@pytest.mark.parametrize("name", [*MATRIX, *OTHERS])
def test_a_pipeline_equals_one_process(answers: dict[str, Any], name: str) -> None:
    one, ours = single(answers, name), answers[name]
    assert len(losses(one)) == STEPS
    assert losses(ours) == pytest.approx(losses(one), rel=1e-5)
    assert norms(ours) == pytest.approx(norms(one), rel=1e-4)
    assert [step["tokens"] for step in ours["steps"]] == [step["tokens"] for step in one["steps"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_learns(answers: dict[str, Any], family: str) -> None:
    longer = losses(answers[f"{family}_learning"])
    assert losses(answers[family]) == longer[:STEPS]
    assert longer[-1] < 0.9 * longer[0]


@pytest.mark.parametrize("name", [*MATRIX, *OTHERS])
def test_generation_equals_one_process(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["generated"] == single(answers, name)["generated"]


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_close(answers: dict[str, Any], name: str) -> None:
    full = losses(answers["gpt2"])
    assert losses(answers[name]) == pytest.approx(full, rel=5e-3)
    assert losses(answers[name]) != pytest.approx(full, rel=1e-6)
    assert not any(step["skipped"] for step in answers[name]["steps"])


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_seen(answers: dict[str, Any], name: str) -> None:
    assert not same(answers[name], answers["gpt2"])


@pytest.mark.parametrize("name", MATRIX)
def test_tied_copies_stay_equal_to_the_bit(answers: dict[str, Any], folder: Path, name: str) -> None:
    last = 0 if name.endswith("zbv") else int(name.split("_")[1]) - 1
    first_ranks, last_ranks = (json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, last))
    assert first_ranks["digests"]["transformer.wte.weight"] == last_ranks["digests"]["lm_head.weight"]


def test_a_rank_holds_its_own_blocks_alone(answers: dict[str, Any], folder: Path) -> None:
    held = [json.loads((folder / f"gpt2_4_zbv.{rank}.json").read_text())["digests"] for rank in range(4)]
    blocks = [{int(name.split(".")[2]) for name in names if ".h." in name} for names in held]
    assert blocks == [{0, 7}, {1, 6}, {2, 5}, {3, 4}]


def test_a_checkpoint_continues_to_the_bit(answers: dict[str, Any]) -> None:
    assert losses(answers["gpt2_2_1f1b"], "after")
    assert answers["resumed"]["after"] == answers["gpt2_2_1f1b"]["after"]


@pytest.mark.parametrize("name", ["resumed_in_a_v", "resumed_in_shards"])
def test_a_checkpoint_continues_on_other_stages(answers: dict[str, Any], name: str) -> None:
    assert losses(answers[name], "after") == pytest.approx(losses(answers["gpt2_2_1f1b"], "after"), rel=1e-5)


def test_held_out_loss_equals_one_process(answers: dict[str, Any], folder: Path) -> None:
    ranks = [json.loads((folder / f"gpt2_4_1f1b.{rank}.json").read_text())["held_out"] for rank in range(4)]
    assert [tokens > 0 for _, tokens in ranks] == [False, False, False, True]
    assert ranks[-1][0] / ranks[-1][1] == pytest.approx(5.55, abs=0.1)
