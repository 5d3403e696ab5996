"""What the plan reads of an adapter's folder, and which adapters it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from launcher.config.adapter_folder import MAX_LORA_RANK, AdapterUse, adapter_label, read_adapter_folder
from launcher.config.compose import compose
from launcher.config.job.generate import Generate
from launcher.errors import ConfigError, ConfigErrors
from launcher.execution.prepare import prepare
from launcher.planning.render import render_plan
from launcher.utils.safetensors_header import TensorEntry, header_bytes

CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "bias": "none"}
QUERY = "model.layers.3.self_attn.q_proj"
PREFIX = "base_model.model."


def matrices(module: str = QUERY, rank: int = 4, inner: int = 128, out: int = 128) -> dict[str, tuple[int, ...]]:
    return {f"{PREFIX}{module}.lora_A.weight": (rank, inner), f"{PREFIX}{module}.lora_B.weight": (out, rank)}


def write_adapter(folder: Path, tensors: Mapping[str, tuple[int, ...]] | None = None, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changed}))
    shapes = matrices() if tensors is None else tensors
    entries = [TensorEntry(name=name, dtype="F32", shape=shape) for name, shape in shapes.items()]
    values = bytes(sum(entry.num_bytes for entry in entries))
    (folder / "adapter_model.safetensors").write_bytes(header_bytes(entries, {}) + values)
    return folder


def refused(*words: str) -> list[str]:
    base = ["job=serve", "model=llama_tiny", "job.tokenizer=bytes", "backend.ranks=1", "tracker=local"]
    with pytest.raises(ConfigErrors) as caught:
        prepare(compose([*base, *words]))
    return [str(error) for error in caught.value.errors]


def planned(*words: str) -> str:
    base = ["job=serve", "model=llama_tiny", "job.tokenizer=bytes", "backend.ranks=1", "tracker=local"]
    return render_plan(prepare(compose([*base, *words])).plan)


def test_scales_and_ranks_are_those_of_peft(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.k_proj"
    tensors = {**matrices(), **matrices(key, rank=9, out=64)}
    patterns = {"rank_pattern": {"k_proj": 9}, "alpha_pattern": {r".*layers\.0\..*": 18}}
    for name, root, scales in (("plain", False, (18 / 9, 6 / 4)), ("rs", True, (18 / 3, 6 / 2))):
        folder = write_adapter(tmp_path / name, tensors, use_rslora=root, **patterns)
        found = read_adapter_folder("job.adapters.a", str(folder), use=AdapterUse.ENGINE)
        assert [layer.scale for layer in found.layers.values()] == pytest.approx(list(scales))
        assert [layer.rank for layer in found.layers.values()] == [9, 4]
        assert found.numel == 9 * (128 + 64) + 4 * (128 + 128)


ENGINE, MODEL = AdapterUse.ENGINE, AdapterUse.MODEL
REFUSED: list[tuple[tuple[AdapterUse, ...], dict[str, Any], str]] = [
    ((ENGINE, MODEL), {"peft_type": "IA3"}, "of type IA3, not LORA; merge it"),
    ((ENGINE, MODEL), {"task_type": "SEQ_CLS"}, "another task (SEQ_CLS)"),
    ((ENGINE, MODEL), {"lora_bias": True}, "biases of its own"),
    ((ENGINE, MODEL), {"init_lora_weights": "pissa"}, "init_lora_weights=pissa); save it with path_initial_model_for"),
    ((ENGINE, MODEL), {"use_new_thing": 3}, "sets use_new_thing, which the launcher does not support"),
    ((ENGINE, MODEL), {"use_qalora": True}, "sets use_qalora, which the launcher does not support"),
    ((ENGINE, MODEL), {"r": 5}, f"says rank 5 for {QUERY}, whose tensors have 4"),
    ((ENGINE, MODEL), {"lora_alpha": None}, "lora_alpha None, which is not a number"),
    ((ENGINE, MODEL), {"lora_alpha": -1}, "says alpha=-1: must be above 0"),
    ((ENGINE,), {"use_dora": True}, "is a DoRA adapter: it rescales the base layer's output"),
    ((ENGINE,), {"modules_to_save": ["lm_head"]}, "replaces whole modules"),
    ((ENGINE,), {"bias": "all"}, "changes biases of the base model (bias=all)"),
    ((ENGINE,), {"rank_pattern": {"(": 1}}, "invalid rank_pattern"),
    ((MODEL,), {"rank_pattern": {"q_proj": 4}}, "values of their own (rank_pattern), which job.adapters supports"),
    ((MODEL,), {"alpha_pattern": {"q_proj": 4}}, "values of their own (alpha_pattern)"),
    ((MODEL,), {"use_dora": True, "use_rslora": True}, "of DoRA and rsLoRA together"),
]


@pytest.mark.parametrize(("use", "changed", "said"), [(use, *rest) for uses, *rest in REFUSED for use in uses])
def test_settings_that_mean_something_else_are_refused(
    use: AdapterUse, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", **changed)
    with pytest.raises(ConfigError) as caught:
        read_adapter_folder("job.adapters.polite", str(folder), use=use)
    assert str(caught.value).startswith(f"job.adapters.polite={folder}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("changed", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm"]}])
def test_a_model_takes_what_the_engine_refuses(changed: dict[str, Any], tmp_path: Path) -> None:
    found = read_adapter_folder("model.adapter", str(write_adapter(tmp_path / "a", **changed)), use=MODEL)
    assert list(found.layers) == [QUERY]
    assert (found.lora.is_dora, found.lora.bias) == (changed.get("use_dora", False), changed.get("bias", "none"))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "holds no tensors"),
        ({f"{PREFIX}lm_head.weight": (8, 8)}, "lm_head.weight, which is no LoRA matrix"),
        ({f"{PREFIX}{QUERY}.lora_magnitude_vector": (128,)}, "no LoRA matrix of a linear layer"),
        (dict(list(matrices().items())[:1]), "lora_B of shape []"),
        (matrices(rank=0), "they must be (rank, in) and (out, rank)"),
        (matrices(rank=MAX_LORA_RANK + 1), f"takes at most {MAX_LORA_RANK}"),
        (matrices("model.layers.4.self_attn.q_proj"), "model.layers.4.self_attn.q_proj, and llama_tiny has no such"),
        (matrices("model.layers.0.attn.c_attn"), "set model to the one that it was trained on"),
        (matrices("lm_head", out=2048), "adapts the output layer lm_head"),
        (matrices(out=256), f"adapts {QUERY} of 128 to 256 features, which in llama_tiny has 128 to 128"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(
    tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path
) -> None:
    rank = next(iter(tensors.values()), (4,))[0] if tensors else 4
    folder = write_adapter(tmp_path / "a", tensors, r=rank)
    (error,) = refused(f"job.adapters.polite={folder}")
    assert said in error


def test_folders_that_hold_no_adapter_are_refused(tmp_path: Path) -> None:
    model, pickled, cut, broken, empty = (tmp_path / name for name in ("model", "pickled", "cut", "broken", "empty"))
    for folder in (model, pickled, cut, broken, empty):
        write_adapter(folder)
    (empty / "adapter_model.safetensors").unlink()
    (model / "adapter_config.json").rename(model / "config.json")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with (cut / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(500)
    (broken / "adapter_config.json").write_text("{")
    said = {
        model: "is a whole model, not an adapter",
        pickled: "a pickle (adapter_model.bin), which could run code when it is read; load it with PEFT and save it",
        empty: "holds no adapter_model.safetensors; give a folder with adapter_config.json and",
        cut: "adapter_model.safetensors has 500 bytes",
        broken: "adapter_config.json cannot be read",
        tmp_path / "absent": "there is no such folder; give a folder with adapter_config.json",
        tmp_path: "holds no adapter_config.json",
    }
    errors = refused(*(f"job.adapters.a{number}={folder}" for number, folder in enumerate(said)))
    for error, (folder, why) in zip(errors, said.items(), strict=True):
        assert f"={folder}: " in error
        assert why in error


def test_names_that_cannot_choose_an_adapter_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    assert "is the name of the base model" in refused(f"job.adapters.llama_tiny={folder}")[0]
    assert "is the name of the base model" in refused("job.served_model_name=x", f"job.adapters.x={folder}")[0]
    assert "is not a name that a request can send" in refused(f"job.adapters.{'a' * 101}={folder}")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["job.engine=echo"], "job.engine=echo serves the base model alone; set job.engine=paged"),
        (["parallel=tensor", "parallel.tensor=2", "backend.ranks=2"], "adapters are not split; set parallel=single"),
        (["parallel=pipeline", "parallel.stages=2", "backend.ranks=2"], "adapters are not split; set parallel=single"),
    ],
)
def test_engines_that_apply_no_adapters_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    errors = refused(*words, f"job.adapters.a={write_adapter(tmp_path / 'a')}")
    assert any(said in error for error in errors), errors


def test_adapters_beside_an_adapter_of_the_model_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", matrices(inner=576, out=576))
    errors = refused("model=smollm2_135m", f"job.adapters.a={folder}", f"model.adapter={folder}")
    assert any(f"set job.adapters.NAME={folder} instead" in error for error in errors), errors


def test_the_adapter_of_a_prompt_file_is_one_of_the_adapters(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (error,) = refused("job=generate", f"job.adapters.polite={folder}", "job.adapter=polit")
    assert error == "job.adapter=polit: is not a name in job.adapters; did you mean polite?"
    (error,) = refused("job=generate", "job.adapter=polite")
    assert "add job.adapters.polite=FOLDER" in error


def test_lines_choose_among_the_base_model_and_the_adapters(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    run = compose(["job=generate", "model=llama_tiny", f"job.adapters.polite={folder}", "job.adapter=polite"]).run
    job = cast("Generate", run.job)
    assert job.models(run) == {"llama_tiny": "", "polite": "polite"}
    assert job.default_fields["model"] == "polite"


def test_the_plan_shows_adapters_and_counts_their_memory(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    shown = planned(f"job.adapters.polite={folder}", "job.replicas=2")
    assert "polite (a, rank 4); 4.00 KiB in an engine" in shown
    assert "4 bytes of fp32 a parameter of the adapters" in shown
    assert "parameter of the adapters" not in planned()


def test_the_label_of_an_adapter_is_its_folder_or_its_checkpoint() -> None:
    assert adapter_label("adapters/polite") == "polite"
    assert adapter_label("/runs/a/20260101-120000-abcd/checkpoints/step_00000004/model") == (
        "20260101-120000-abcd@step_00000004"
    )
