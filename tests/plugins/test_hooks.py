"""Callbacks, transforms, metrics and optimizers of plugins: what they may do, and what is rejected."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config.activation import NoCheckpointing
from launcher.config.compose import compose
from launcher.config.plugins import load_plugins
from launcher.engines.base import StepResult
from launcher.engines.optimizer import make_optimizer
from launcher.errors import ConfigError, JobError, exit_code_of_rank
from launcher.models.build import build_model
from launcher.plugins.calls import PluginError
from launcher.testing.model import save_weights
from launcher.training.callbacks import Callbacks
from launcher.training.evaluation_metrics import MetricSums, load_metrics
from tests.plugins.conftest import WritePlugin

RESULT = StepResult(loss=1.0, grad_norm=1.0, tokens=4)
HEAD = "import torch\nfrom torch import nn\nfrom launcher.training.callbacks import Callback\n"
Load = Callable[..., None]


@pytest.fixture
def load(write_plugin: WritePlugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Write and load a plugin whose parts are the definitions of a text, by group and name."""

    def write(text: str, *, name: str = "mine", more: str = "", **groups: dict[str, str]) -> None:
        executors = {
            group: {kind: f"{name}.parts:{target}" for kind, target in of.items()} for group, of in groups.items()
        }
        write_plugin(f'Plugin(name="{name}", executors={executors!r}{more})', name=name)
        (tmp_path / name / "parts.py").write_text(HEAD + text)
        load_plugins([name])

    return write


def callbacks(*names: str) -> Callbacks:
    context: Any = SimpleNamespace(run=None)
    engine: Any = SimpleNamespace(module=None)
    return Callbacks(names, context, engine)


COUNTER = """
class Counter(Callback):
    def __init__(self, context, engine):
        super().__init__(context, engine)
        self.calls = []
    def on_start(self, step): self.calls.append(("on_start", step))
    def before_step(self, step): self.calls.append(("before_step", step))
    def on_step(self, step, result):
        return {"calls": len(self.calls)}
    def on_end(self, step): return {"ended": torch.tensor(step)}
    def on_exception(self, error): raise OSError("cannot tell")
    def state_dict(self): return {"calls": [list(call) for call in self.calls], "mean": torch.ones(2)}
    def load_state_dict(self, state): self.calls = [tuple(call) for call in state["calls"]]
"""


def test_the_state_of_a_callback_is_in_the_checkpoint(load: Load, tmp_path: Path) -> None:
    load(COUNTER, callback={"counter": "Counter", "other": "Counter"})
    one = callbacks("counter")
    one.on_start(3)
    one.before_step(4)
    one.save(tmp_path, is_main=False)
    assert not (tmp_path / "callbacks.pt").exists()
    one.save(tmp_path, is_main=True)
    resumed = callbacks("other", "counter")
    resumed.load(tmp_path)
    assert resumed._all["other"].calls == []  # type: ignore[attr-defined]
    assert dict(resumed._all["counter"].on_step(4, RESULT)) == {"calls": 2}
    assert callbacks("counter").on_end(5) == {"callback/ended": 5.0}
    callbacks("counter").load(tmp_path / "without")


def test_an_exception_names_callback_plugin_and_method(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    text = COUNTER + "\nclass Broken(Callback):\n    def on_step(self, step, result): return 1 / 0\n"
    text += "    def before_step(self, step): raise SystemExit(0)\n"
    load(text, callback={"broken": "Broken", "counter": "Counter"})
    with pytest.raises(
        PluginError, match=r"callback broken \(plugin mine, .*\), on_step: ZeroDivisionError: division"
    ) as caught:
        callbacks("broken").on_step(1, RESULT)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(PluginError, match=r"callback broken .*before_step: SystemExit: 0"):
        callbacks("broken").before_step(1)
    callbacks("counter", "broken").on_exception(ValueError("x"))
    assert (
        "callback counter (plugin mine, plugins=[mine]), on_exception: OSError: cannot tell" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class X(Callback):\n    def on_stepp(self, step): pass", "X.on_stepp is never called; did you mean on_step?"),
        ("class X: pass", "is no class that derives from Callback"),
        ("class X(Callback):\n    def on_step(self, step, result): return 3", "returned int"),
        ("class X(Callback):\n    def on_step(self, step, result): return {'a': 'b'}", "returned 'a' with str"),
        (
            "class X(Callback):\n    def on_step(self, step, result): return {'a': torch.ones(2)}",
            "returned 'a' with Ten",
        ),
        ("class X(Callback):\n    def state_dict(self): return {'a': [Callback]}", r"state\['a'\]\[0\] is a type"),
        ("class X(Callback):\n    def state_dict(self): return [1]", "state_dict returned list; return a dict"),
    ],
)
def test_what_a_callback_may_not_do(text: str, said: str, load: Load, tmp_path: Path) -> None:
    load(text + "\n", callback={"x": "X"})

    def use() -> None:
        made = callbacks("x")
        made.on_step(1, RESULT)
        made.save(tmp_path, is_main=True)

    with pytest.raises(JobError, match=said) as caught:
        use()
    assert "callback x (plugin mine" in str(caught.value)
    assert caught.value.exit_code == 65


TWO = """
class A(Callback):
    def on_step(self, step, result): return {"norm": 1.0}
class B(Callback):
    def on_evaluate(self, step, loss): return {"norm": 2.0}
"""


def test_two_callbacks_that_record_one_metric_are_named(load: Load) -> None:
    load(TWO, callback={"a": "A", "b": "B"})
    both = callbacks("a", "b")
    assert both.on_step(1, RESULT) == {"callback/norm": 1.0}
    with pytest.raises(
        ConfigError, match=r"a \(plugin mine.*\) and b \(plugin mine.*\) both record the metric norm"
    ) as caught:
        both.on_evaluate(1, 2.0)
    assert exit_code_of_rank(caught.value) == 65


def test_declared_metrics_are_compared_in_the_plan(load: Load) -> None:
    load(TWO, callback={"a": "A", "b": "B"}, more=', callback_metrics={"a": ["norm"], "b": ("norm", "x")}')
    compose(["job.callbacks=[a]"])
    with pytest.raises(ConfigError, match=r"^job.callbacks=b.*: a \(plugin mine.*both record the metric norm"):
        compose(["job.callbacks=[a,b]"])
    with pytest.raises(ConfigError, match=r"^job.callbacks=a.*: the callback is named 2 times; name it once"):
        compose(["job.callbacks=[a,a]"])
    assert callbacks("b").on_evaluate(1, 2.0) == {"callback/norm": 2.0}


def test_a_metric_that_is_not_declared_is_refused(load: Load) -> None:
    load(TWO, callback={"a": "A"}, more=', callback_metrics={"a": ["other"]}')
    with pytest.raises(JobError, match="records the metric norm, which its plugin does not declare; add it to"):
        callbacks("a").on_step(1, RESULT)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (', callback_metrics={"b": ["x"]}', "callback_metrics names b, which is not a callback of this plugin"),
        (', callback_metrics={"a": "x"}', "callback_metrics has values that are not lists of text"),
    ],
)
def test_wrong_declarations_are_refused(more: str, said: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=said):
        load(TWO, callback={"a": "A"}, more=more)


def test_names_of_the_launchers_own_metrics_are_taken(load: Load) -> None:
    with pytest.raises(ConfigError, match="adds the metric loss, which the launcher already has"):
        load("def f(logits, labels): pass", metric={"loss": "f"})


@pytest.mark.parametrize("option", ["job.metrics=[f]", "job.transforms=[f]"])
@pytest.mark.parametrize("parallel", ["pipeline", "deepspeed_pipeline"])
def test_pipelines_reject_transforms_and_metrics(
    option: str, parallel: str, load: Load, plan_of: Callable[..., Any]
) -> None:
    load("def f(*_): pass", metric={"f": "f"}, transform={"f": "f"})
    with pytest.raises(
        ConfigError, match=r"job.\w+=\[f\].*: under parallel=.*pipeline no rank has .*; leave job.\w+ out"
    ):
        plan_of(option, f"parallel={parallel}")
    shown = plan_of(option, "parallel=ddp").details
    assert shown[option[4:].partition("=")[0]] == "f (plugin mine, plugins=[mine])"


TRANSFORMS = """
class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.empty(3))
        self.register_buffer("shift", torch.empty(3))
    def reset_parameters(self):
        nn.init.constant_(self.scale, 2.0)
        self.shift.fill_(0.5)
    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)
class Unset(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
class Filled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, device="cpu"))
def scale(model):
    model.transformer.h[0].mlp = Scaled(model.transformer.h[0].mlp)
def freeze(model):
    model.transformer.h[1].requires_grad_(False)
def freeze_all(model): model.requires_grad_(False)
def unset(model): model.transformer.h[0].extra = Unset()
def filled(model): model.transformer.h[0].extra = Filled()
def returns(model): return model
def broken(model): model.no_such_thing()
"""
NAMES = ("scale", "freeze", "freeze_all", "unset", "filled", "returns", "broken")
TINY = compose(["model=gpt2_tiny", "model.num_hidden_layers=2", "model.hidden_size=8"]).run


def built(*transforms: str, **changes: Any) -> nn.Module:
    return build_model(
        TINY.model,
        seed=1,
        attention=TINY.attention,
        activation=NoCheckpointing(),
        transforms=transforms,
        **changes,
    )


def test_transforms_change_the_model_before_it_has_weights(load: Load) -> None:
    load(TRANSFORMS, transform=dict(zip(NAMES, NAMES, strict=True)))
    plain, changed = built(), built("scale", "freeze")
    block = changed.get_submodule("transformer.h.0.mlp")
    assert (block.scale.tolist(), block.shift.tolist()) == ([2.0] * 3, [0.5] * 3)
    frozen = {name for name, parameter in changed.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in plain.named_parameters() if name.startswith("transformer.h.1.")}
    renamed = {name.replace(".mlp.inner.", ".mlp."): value for name, value in changed.state_dict().items()}
    assert all(torch.equal(value, renamed[name]) for name, value in plain.state_dict().items())


def test_weights_must_fit_the_transformed_model(load: Load, tmp_path: Path) -> None:
    load(TRANSFORMS, transform=dict(zip(NAMES, NAMES, strict=True)))
    trained = built("scale")
    with torch.no_grad():
        trained.get_parameter("transformer.h.0.mlp.scale").fill_(3.0)
        trained.get_buffer("transformer.h.0.mlp.shift").fill_(0.7)
    scaled = replace(TINY.model, weights=str(save_weights(trained, tmp_path / "scaled")))
    again = build_model(scaled, seed=9, attention=TINY.attention, activation=NoCheckpointing(), transforms=("scale",))
    found = again.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in trained.state_dict().items())
    with pytest.raises(ConfigError, match=r"also has .*mlp.inner.*, with the job.transforms that they were trained"):
        build_model(scaled, seed=9, attention=TINY.attention, activation=NoCheckpointing())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unset", r"Unset has parameters or buffers and no reset_parameters\(\)"),
        ("filled", "Filled has values already"),
        ("returns", "returned GPT2LMHeadModel"),
    ],
)
def test_what_a_transform_may_not_do(name: str, said: str, load: Load) -> None:
    load(TRANSFORMS, transform=dict(zip(NAMES, NAMES, strict=True)))
    with pytest.raises(JobError, match=said) as caught:
        built(name)
    assert f"transform {name} (plugin mine" in str(caught.value)


def test_an_exception_in_a_transform_names_it(load: Load) -> None:
    load(TRANSFORMS, transform=dict(zip(NAMES, NAMES, strict=True)))
    with pytest.raises(PluginError, match=r"transform broken \(plugin mine.*AttributeError"):
        built("broken")


METRICS = """
def accuracy(logits, labels):
    counted = labels >= 0
    return ((logits.argmax(-1) == labels) & counted).sum(), counted.sum()
def mean(logits, labels): return logits.mean()
def broken(logits, labels): raise KeyError("x")
"""


def test_metrics_are_sums_over_batches_and_ranks(load: Load) -> None:
    load(METRICS, metric={"accuracy": "accuracy", "mean": "mean", "broken": "broken"})
    logits = torch.eye(4).unsqueeze(0)
    ranks = []
    for batches in ([[0, 1, 2, 0], [0, 0, -100, -100]], [[-100, -100, 2, 3]]):
        sums = MetricSums(load_metrics(["accuracy"]))
        for labels in batches:
            sums.add(logits, torch.tensor([labels]))
        ranks.append(sums.values())
    assert ranks == [[4.0, 6.0], [2.0, 2.0]]
    assert sums.means([6.0, 8.0]) == {"accuracy": 0.75}
    assert math.isnan(sums.means([0.0, 0.0])["accuracy"])
    with pytest.raises(JobError, match=r"metric mean \(plugin mine.*returned Tensor, and not a sum and a count"):
        MetricSums(load_metrics(["mean"])).add(logits, torch.zeros(1, 4))
    with pytest.raises(PluginError, match=r"metric broken \(plugin mine.*KeyError"):
        MetricSums(load_metrics(["broken"])).add(logits, torch.zeros(1, 4))


OPTIMIZERS = """
def by_name(options, groups):
    pairs = [(group, pair) for group in groups for pair in group["params"]]
    split = [{**group, "params": [pair], "lr_scale": 0.5 if "1" in pair[0] else 1.0} for group, pair in pairs]
    return torch.optim.SGD(split, lr=options.lr)
def forgetful(options, groups): return torch.optim.SGD([groups[0]["params"][0][1]], lr=1.0)
def greedy(options, groups): return torch.optim.SGD([*groups, {"params": [("x", nn.Parameter(torch.ones(1)))]}], lr=1.0)
"""


def test_factories_of_optimizers_get_named_parameters(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    load(OPTIMIZERS, loss={name: name for name in ("by_name", "forgetful", "greedy")})  # any group: looked up below
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [{"params": list(module.parameters()), "weight_decay": 0.0}]
    parts = importlib.import_module("mine.parts")

    def make(factory: str) -> torch.optim.Optimizer:
        monkeypatch.setattr("launcher.engines.optimizer.executor", lambda *_: getattr(parts, factory))
        options: Any = SimpleNamespace(kind="mine", lr=0.1)
        return make_optimizer(options, groups, names=names)

    scales = {group["param_names"][0]: group["lr_scale"] for group in make("by_name").param_groups}
    assert scales == {"0.weight": 1.0, "0.bias": 1.0, "1.weight": 0.5, "1.bias": 0.5}
    with pytest.raises(JobError, match=r"it leaves out 3 parameters, 0.bias first; freeze them by a transform"):
        make("forgetful")
    with pytest.raises(JobError, match="it updates parameters that it was not given"):
        make("greedy")
    options: Any = SimpleNamespace(kind="adamw", lr=0.1)
    with pytest.raises(ConfigError, match=r"job.transforms: they leave no parameter to train"):
        make_optimizer(options, [], names={})
