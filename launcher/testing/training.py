"""What every loss, evaluation metric and callback keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from launcher.config.run import Run
from launcher.data.rows import IGNORE_INDEX
from launcher.engines.base import StepResult
from launcher.plugins.base import CALLBACK, LOSS, METRIC
from launcher.plugins.loading import executor
from launcher.protocol.rundir import RunDir
from launcher.testing.base import PartContract
from launcher.training.callbacks import Callbacks
from launcher.training.evaluation_metrics import MetricSums


def _batch(*, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits of four sequences, and labels of which some do not count."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 6, 11, generator=generator)
    labels = torch.randint(0, 11, (4, 6), generator=generator)
    labels[1, 3:] = IGNORE_INDEX
    return logits, labels


class LossContract(PartContract):
    """Checks of one loss."""

    name: ClassVar[str]
    """As ``job.loss`` names it."""

    @pytest.fixture
    def loss(self, configured: Run) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function."""
        found: Callable[[Tensor, Tensor], Tensor] = executor(LOSS, self.name, {})
        return found

    def test_it_is_a_sum_over_the_labelled_tokens(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """So it does not depend on micro-batches and ranks; tokens without a label add nothing."""
        logits, labels = _batch()
        whole = loss(logits, labels)
        assert whole.ndim == 0
        torch.testing.assert_close(loss(logits[:1], labels[:1]) + loss(logits[1:], labels[1:]), whole)
        torch.testing.assert_close(loss(logits[:, :3], labels[:, :3]) + loss(logits[:, 3:], labels[:, 3:]), whole)

    def test_its_gradient_is_finite_and_zero_without_label(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Also for logits in bf16."""
        logits, labels = _batch()
        for dtype in (torch.float32, torch.bfloat16):
            given = logits.to(dtype).detach().requires_grad_()
            loss(given, labels).backward()
            assert given.grad is not None
            assert bool(given.grad.isfinite().all())
            assert not given.grad[labels == IGNORE_INDEX].any()


class MetricContract(PartContract):
    """Checks of one metric of evaluations."""

    name: ClassVar[str]
    """As ``job.metrics`` names it."""

    def test_it_does_not_depend_on_batches(self, configured: Run) -> None:
        """Sums over parts of sequences, as ranks have them, give the metric of the whole."""
        metric, (logits, labels) = executor(METRIC, self.name, {}), _batch()
        found = []
        for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
            sums = MetricSums({self.name: metric})
            for part in parts:
                sums.add(logits[part, :3], labels[part, :3])
                sums.add(logits[part, 3:], labels[part, 3:])
            found.append(sums.means(sums.values())[self.name])
        assert found[0] == pytest.approx(found[1], rel=1e-6)


class CallbackContract(PartContract):
    """Checks of one callback, on a model of one layer; a subclass may give another engine."""

    name: ClassVar[str]
    """As ``job.callbacks`` names it."""

    @pytest.fixture
    def engine(self) -> Any:
        """Return what stands for an engine: a model, its device and its weights."""

        def weights() -> Iterator[tuple[str, Tensor]]:
            yield from module.named_parameters()

        module = nn.Linear(4, 4)
        return SimpleNamespace(module=module, device=torch.device("cpu"), weights=weights)

    @pytest.fixture
    def make(self, configured: Run, engine: Any, tmp_path: Path) -> Callable[[], Callbacks]:
        """Return a function that makes it for rank 0 of a run."""
        context: Any = SimpleNamespace(
            run=configured, run_dir=RunDir(tmp_path), rank=0, local_rank=0, world_size=1, is_main=True, run_id="x"
        )
        return lambda: Callbacks((self.name,), context, engine)

    @staticmethod
    def train(callbacks: Callbacks, folder: Path) -> None:
        """Call every method in the order of a run of two steps."""
        callbacks.on_start(0)
        for step in (1, 2):
            callbacks.before_step(step)
            callbacks.on_step(step, StepResult(loss=2.0, grad_norm=1.0, tokens=64))
        callbacks.on_evaluate(2, 2.1)
        callbacks.on_save(2, folder)
        callbacks.on_end(2)

    def test_its_methods_return_what_can_be_recorded(self, make: Callable[[], Callbacks], tmp_path: Path) -> None:
        """Names that its plugin declares, with numbers."""
        self.train(make(), tmp_path)

    def test_its_state_comes_back(self, make: Callable[[], Callbacks], tmp_path: Path) -> None:
        """A callback that loaded a state saves the same state."""
        first, second = make(), make()
        self.train(first, tmp_path)
        folders = [tmp_path / "first", tmp_path / "second"]
        for folder in folders:
            folder.mkdir()
        first.save(folders[0], is_main=True)
        second.load(folders[0])
        second.save(folders[1], is_main=True)
        saved = [sorted((file.name, file.read_bytes()) for file in folder.iterdir()) for folder in folders]
        assert saved[0] == saved[1]

    def test_it_stands_an_exception(self, make: Callable[[], Callbacks], capsys: pytest.CaptureFixture[str]) -> None:
        """An error of its own would be printed beside the one that ends the run."""
        made = make()
        made.on_start(0)
        made.on_exception(ValueError("planted"))
        assert f"{CALLBACK} {self.name} (" not in capsys.readouterr().out
