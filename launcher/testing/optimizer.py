"""What every optimizer and schedule keeps."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import torch
from torch import nn

from launcher.config.optimizer import Muon
from launcher.config.run import Run
from launcher.engines.optimizer import make_optimizer, parameter_groups, parameter_names, set_rates
from launcher.testing.base import PartContract


class OptimizerContract(PartContract):
    """Checks of one optimizer: it keeps, updates, names and restores what it should."""

    @staticmethod
    def make(configured: Run, module: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a module, built as an engine builds it."""
        names = parameter_names([module])
        matrices = [parameter for parameter in names if parameter.ndim == 2]
        hidden = matrices if isinstance(configured.optimizer, Muon) else None
        groups = parameter_groups(names, configured.optimizer, hidden=hidden)
        return make_optimizer(configured.optimizer, groups, names=names)

    @staticmethod
    def module() -> nn.Module:
        """Return a small model with matrices and vectors."""
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))

    @staticmethod
    def step(module: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int, lr: float = 1e-2) -> None:
        """Take a step on numbers that the seed draws."""
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        module(torch.randn(3, 4, generator=generator)).square().sum().backward()
        set_rates(optimizer, lr)
        optimizer.step()

    def test_it_updates_every_parameter_by_the_rate_of_the_step(self, configured: Run) -> None:
        """A rate of zero changes nothing; another one changes each, and keeps all finite."""
        module = self.module()
        optimizer, before = self.make(configured, module), copy.deepcopy(module.state_dict())
        self.step(module, optimizer, seed=1, lr=0.0)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        self.step(module, optimizer, seed=1)
        after = module.state_dict()
        assert [name for name, value in after.items() if torch.equal(value, before[name])] == []
        assert all(bool(value.isfinite().all()) for value in after.values())

    def test_a_parameter_without_gradient_stays(self, configured: Run) -> None:
        """Layers that a step does not use have no gradient."""
        module = self.module()
        optimizer, unused = self.make(configured, module), module[2].weight.detach().clone()
        module[0](torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert torch.equal(module[2].weight, unused)

    def test_its_state_has_the_names_that_its_options_declare(self, configured: Run) -> None:
        """FSDP saves by these names: ``step`` is a scalar, others have the parameter's shape."""
        declared = configured.optimizer.state_names
        if not declared:
            return  # the plan rejects FSDP
        module = self.module()
        optimizer = self.make(configured, module)
        self.step(module, optimizer, seed=1)
        for parameter in module.parameters():
            state = optimizer.state[parameter]
            assert set(state) == set(declared)
            for name, value in state.items():
                assert value.shape == (torch.Size() if name == "step" else parameter.shape), name

    def test_it_continues_exactly_from_a_saved_state(self, configured: Run) -> None:
        """The next step after a resume equals the next step without it, to the bit."""
        module = self.module()
        optimizer = self.make(configured, module)
        self.step(module, optimizer, seed=1)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        resumed = copy.deepcopy(module)
        other = self.make(configured, resumed)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        for one, its in ((module, optimizer), (resumed, other)):
            self.step(one, its, seed=2)
        found: dict[str, Any] = resumed.state_dict()
        assert [name for name, value in module.state_dict().items() if not torch.equal(value, found[name])] == []


class ScheduleContract(PartContract):
    """Checks of one schedule of the learning rate."""

    def test_its_factors_are_finite_shares_of_the_peak(self, configured: Run) -> None:
        """Also for one step, and where the warm-up is longer than the run."""
        for steps in (1, 2, 100):
            factors = [configured.schedule.factor(step, steps) for step in range(steps)]
            assert all(math.isfinite(factor) and 0.0 <= factor <= 1.0 for factor in factors), factors
            assert factors == [configured.schedule.factor(step, steps) for step in range(steps)]

    def test_it_rises_in_the_warm_up_to_the_peak(self, configured: Run) -> None:
        """The first step after the warm-up has the whole rate."""
        schedule = configured.schedule
        warm = [schedule.factor(step, 1000) for step in range(schedule.num_warmup_steps(1000) + 1)]
        assert warm == sorted(warm)
        assert math.isclose(warm[-1], 1.0)
