"""Our lists of DeepSpeed's keys are those the installed DeepSpeed reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from launcher.config.parallel import deepspeed_keys
from launcher.config.parallel.deepspeed_keys import merge_raw_keys, validate_raw_keys


class Spy(dict[str, Any]):
    """A configuration that notes which of its keys are asked for."""

    def __init__(self, content: dict[str, Any], asked: set[str]) -> None:
        super().__init__(content)
        self.asked = asked

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return SpyKeys(self)

    def __copy__(self) -> Spy:
        return Spy(dict(self), self.asked)


class SpyKeys:
    def __init__(self, spied: Spy) -> None:
        self.spied = spied

    def __contains__(self, key: object) -> bool:
        return key in self.spied

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.spied))


@pytest.fixture(scope="module", autouse=True)
def cpu_accelerator() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.mark.filterwarnings("ignore")
def test_top_level_keys_are_those_deepspeed_reads() -> None:
    from deepspeed.runtime import config

    asked: set[str] = set()
    config.DeepSpeedConfig(Spy({"train_batch_size": 1}, asked))
    known = deepspeed_keys.FREE_KEYS | deepspeed_keys.OWNED_KEYS.keys() | deepspeed_keys.FIXED_KEYS
    assert asked - config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() == known


@pytest.mark.filterwarnings("ignore")
def test_zero_keys_are_those_of_deepspeeds_model() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert (
        names == deepspeed_keys.FREE_ZERO_KEYS | deepspeed_keys.OWNED_ZERO_KEYS.keys() | deepspeed_keys.FIXED_ZERO_KEYS
    )


@pytest.mark.parametrize(
    ("raw", "option", "phrase"),
    [
        (
            {"zero_optimisation": {"stage": 2}},
            "parallel.deepspeed.zero_optimisation",
            "did you mean zero_optimization?",
        ),
        ({"gradient_cliping": 1}, "parallel.deepspeed.gradient_cliping", "did you mean gradient_clipping"),
        ({"train_batch_size": 8}, "parallel.deepspeed.train_batch_size", "set job.global_batch instead"),
        ({"gradient_clipping": 1}, "parallel.deepspeed.gradient_clipping", "set job.clip_norm instead"),
        ({"fp16": {"enabled": True}}, "parallel.deepspeed.fp16", "set precision instead"),
        ({"optimizer": {}}, "parallel.deepspeed.optimizer", "set optimizer instead"),
        ({"pipeline": {}}, "parallel.deepspeed.pipeline", "remove parallel.deepspeed.pipeline"),
        (
            {"zero_optimization": {"zenflow": {}}},
            "parallel.deepspeed.zero_optimization.zenflow",
            "checkpoints do not hold",
        ),
        ({"datastates_ckpt": {}}, "parallel.deepspeed.datastates_ckpt", "launcher writes checkpoints itself"),
        ({"zero_optimization": {"stage": 1}}, "parallel.deepspeed.zero_optimization.stage", "set parallel.stage"),
        ({"zero_optimization": {"stge": 1}}, "parallel.deepspeed.zero_optimization.stge", "did you mean stage?"),
        ({"zero_optimization": 3}, "parallel.deepspeed.zero_optimization", "is not a mapping"),
        ({"amp": {}}, "parallel.deepspeed.amp", "DeepSpeed would ignore it"),
    ],
)
def test_a_wrong_raw_key_is_named_with_what_would_work(raw: dict[str, Any], option: str, phrase: str) -> None:
    (problem,) = validate_raw_keys(raw)
    assert problem.option == option
    assert phrase in str(problem)


def test_free_keys_pass() -> None:
    raw = {"aio": {"queue_depth": 16}, "zero_optimization": {"round_robin_gradients": True}, "comms_logger": {}}
    assert not list(validate_raw_keys(raw))


def test_merging_goes_mapping_by_mapping_and_leaves_its_arguments() -> None:
    ours = {"aio": {"block_size": 1, "queue_depth": 8}, "steps_per_print": None}
    assert merge_raw_keys(ours, {"aio": {"queue_depth": 16}, "dump_state": True}) == {
        "aio": {"block_size": 1, "queue_depth": 16},
        "steps_per_print": None,
        "dump_state": True,
    }
    assert ours["aio"] == {"block_size": 1, "queue_depth": 8}
