"""Parts of DeepSpeed's master weights and moments, on one rank without ZeRO; with it other tests take whole engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from launcher.checkpoint.tensors import StoredState, write_shards

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


class Model:
    """A trained, a tied and a frozen parameter, as a stage of a pipeline has them, after some steps."""

    def __init__(self, *, seed: int, steps: int) -> None:
        from launcher.engines.deepspeed.masters import MasterState

        torch.manual_seed(seed)
        self.names = {nn.Parameter(torch.randn(3, 2)): name for name in ("trained", "tied", "frozen")}
        self.trained, self.tied, self.frozen = self.names
        self.frozen.requires_grad_(False)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW([self.trained, self.tied], lr=0.1, fused=True)
        for _ in range(steps):
            self.step()
        self.state = MasterState(self.optimizer, self.names, saved_elsewhere=[self.tied])
        self.whole = MasterState(self.optimizer, self.names)

    def step(self) -> None:
        for parameter in (self.trained, self.tied):
            parameter.grad = parameter.detach() + 1
        self.optimizer.step()


def test_all_that_a_step_needs_is_there(tmp_path: Path) -> None:
    one, other = Model(seed=0, steps=3), Model(seed=1, steps=0)
    write_shards(tmp_path / "file", one.whole.shards())
    stored, progress = StoredState([tmp_path / "file"]), list[tuple[int, int]]()
    stored.on_progress = lambda done, total: progress.append((done, total))
    other.state.load(stored)
    assert progress[0] == (24, 168), "weights and moments of two, and the frozen one"
    assert progress[-1] == (168 + 2 * 4, 168), "beside two scalars"
    assert torch.equal(other.frozen, one.frozen)
    for model in (one, other):
        model.step()
    assert torch.equal(other.trained, one.trained)
    assert torch.equal(other.tied, one.tied)


def test_a_copy_that_another_rank_saves_is_left_out(tmp_path: Path) -> None:
    names = {shard.name for shard in Model(seed=0, steps=1).state.shards()}
    assert names == {"trained", "exp_avg.trained", "exp_avg_sq.trained", "step.trained", "frozen"}


def test_before_the_first_step_moments_are_zero_and_stay_uncreated() -> None:
    model = Model(seed=0, steps=0)
    shards = {shard.name: shard.read() for shard in model.state.shards()}
    assert shards["exp_avg.trained"].tolist() == [0.0] * 6
    assert shards["step.trained"].item() == 0
    assert not model.optimizer.state


class CountsByGroup(torch.optim.Optimizer):
    """As DeepSpeed's fused Adam, it counts in the state of the last parameter of a group."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"betas": (0.9, 0.999)})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if not (state := self.state[parameter]):
                    state |= {"step": 0, "exp_avg": torch.zeros(3, 2), "exp_avg_sq": torch.zeros(3, 2)}
            state["step"] += 1


def test_steps_that_an_optimizer_counts_once_for_a_group_are_those_of_each_parameter(tmp_path: Path) -> None:
    from launcher.engines.deepspeed.masters import MasterState

    one, other = Model(seed=0, steps=0), Model(seed=0, steps=0)
    states = []
    for model in (one, other):
        model.optimizer = CountsByGroup([model.trained, model.tied])
        states.append(MasterState(model.optimizer, model.names))
    one.optimizer.step()
    one.optimizer.step()
    write_shards(tmp_path / "file", states[0].shards())
    states[1].load(StoredState([tmp_path / "file"]))
    assert [state["step"] for state in other.optimizer.state.values()] == [2, 2]


def test_another_model_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    model = Model(seed=0, steps=1)
    write_shards(tmp_path / "file", model.state.shards())
    before = model.trained.detach().clone()
    with pytest.raises(ValueError, match=r"it has no step\.tied"):
        model.state.load(StoredState([tmp_path / "file"]))
    assert torch.equal(model.trained, before)


def test_a_part_of_a_swap_file_is_read_and_a_short_file_is_named(tmp_path: Path) -> None:
    from launcher.engines.deepspeed.masters import read_swapped

    file = tmp_path / "0.tensor.swp"
    file.write_bytes(torch.arange(8, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    assert read_swapped(file, dtype=torch.bfloat16, start=2, numel=3).tolist() == [2.0, 3.0, 4.0]
    with pytest.raises(OSError, match=r"0\.tensor\.swp ends early"):
        read_swapped(file, dtype=torch.bfloat16, start=6, numel=3)
