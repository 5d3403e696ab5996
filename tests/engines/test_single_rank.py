"""The parts of engines that need no second rank: what they refuse, and what has nothing to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config.compose import compose
from launcher.config.optimizer import Adafactor, AdamW, Muon
from launcher.config.parallel.zero import Zero
from launcher.engines.distributed import from_main_rank
from launcher.engines.generate import greedy_decode
from launcher.engines.matrix_optimizers import HIDDEN, make_adafactor, make_muon
from launcher.engines.optimizer import OptimizerStep
from launcher.engines.preferences import DpoLoss, preference_loss, without_adapter
from launcher.engines.state import check_shape
from launcher.engines.tensor_parallel import TensorPlan
from launcher.engines.ulysses import check_cut
from launcher.errors import ConfigError, EnvironmentProblem

CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}


@pytest.mark.parametrize("ends", [9, [8, 9]])
def test_greedy_decoding_stops_where_all_sequences_have_ended(ends: Any) -> None:
    planned = iter([[9, 1], [2, 9], [3, 3]])
    calls = []

    def next_tokens(ids: torch.Tensor) -> torch.Tensor:
        calls.append(ids.shape[1])
        return torch.tensor(next(planned))

    found = greedy_decode(next_tokens, torch.tensor([[5], [6]]), max_new_tokens=3, ends=ends)
    assert found.tolist() == [[5, 9, 0], [6, 1, 9]]
    assert calls == [1, 2]


def test_greedy_decoding_without_an_end_takes_all_its_tokens() -> None:
    found = greedy_decode(lambda ids: ids[:, -1] + 1, torch.tensor([[5]]), max_new_tokens=3, ends=None)
    assert found.tolist() == [[5, 6, 7, 8]]


def matrices() -> tuple[nn.Parameter, nn.Parameter]:
    used, unused = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    used.grad = torch.eye(4)
    return used, unused


def test_muon_without_other_parameters_updates_matrices_with_a_gradient_alone() -> None:
    used, unused = matrices()
    optimizer = make_muon(Muon(lr=0.1), [{"params": [("a", used), ("b", unused)], "weight_decay": 0.1, HIDDEN: True}])
    optimizer.step()
    assert not torch.equal(used, torch.ones(4, 4))
    assert torch.equal(unused, torch.ones(4, 4)), "not even decayed"


def test_adafactor_updates_parameters_with_a_gradient_alone() -> None:
    used, unused = matrices()
    optimizer = make_adafactor(Adafactor(lr=0.1), [{"params": [("a", used), ("b", unused)], "weight_decay": 0.1}])
    optimizer.step()
    assert not torch.equal(used, torch.ones(4, 4))
    assert torch.equal(unused, torch.ones(4, 4)), "not even decayed"


def test_a_parameter_that_no_loss_uses_has_no_part_in_the_norm() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1, bias=False), "unused": nn.Linear(2, 1, bias=False)})
    before = model["unused"].weight.detach().clone()
    step = OptimizerStep([model], compose(["job.clip_norm=0"]).run, device=CPU)
    model["used"](torch.tensor([3.0, 4.0])).sum().backward()
    result = step.apply(torch.tensor(1.0, dtype=torch.float64), torch.tensor(1), lr=0.1, preempted=False)
    assert result.grad_norm == pytest.approx(5.0)  # of (3, 4), exact in fp32 but for the root
    assert torch.equal(model["unused"].weight, before)


def test_values_of_the_only_process_are_its_own() -> None:
    assert from_main_rank({"loss": 1.5}, device=CPU) == {"loss": 1.5}


def test_a_checkpoint_without_a_tensor_and_one_with_another_shape_are_refused() -> None:
    source: Any = SimpleNamespace(shapes={"a": (2, 3)})
    check_shape(source, "a", (2, 3))
    with pytest.raises(ValueError, match=r"^it has no b$"):
        check_shape(source, "b", (2, 3))
    with pytest.raises(ValueError, match=r"^a has shape \(2, 3\), this model's \(3, 2\)$"):
        check_shape(source, "a", (3, 2))


def test_a_model_without_a_tensor_plan_or_with_unknown_styles_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    mesh: Any = SimpleNamespace(size=lambda: 2)
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
        llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    TensorPlan(llama, mesh)
    with pytest.raises(
        ConfigError, match=r"parallel\.tensor=2: .*no tensor plan for gpt2 at all; set parallel\.tensor=1"
    ):
        TensorPlan(gpt2, mesh)
    llama.config.base_model_tp_plan = {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.experts": "grouped_gemm"}
    with pytest.raises(ConfigError, match=r"llama with styles grouped_gemm that the launcher does not support"):
        TensorPlan(llama, mesh)


def test_ranks_do_not_split_sequences_that_layers_see_through_a_window() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8))
    check_cut(model, degree=2, length=8)
    with pytest.raises(ConfigError, match=r"parallel\.sequence_parallel=2: mistral has layers that see 8 tokens"):
        check_cut(model, degree=2, length=16)


def test_only_a_job_on_pairs_has_a_loss_of_preferences() -> None:
    job: Any = SimpleNamespace(objective="dpo", dpo_beta=0.5, dpo_label_smoothing=0.0)
    assert isinstance(preference_loss(job, device=CPU), DpoLoss)
    assert preference_loss(SimpleNamespace(objective="causal_lm"), device=CPU) is None  # type: ignore[arg-type]


def test_metrics_of_preferences_are_means_over_the_pairs_that_count_and_begin_anew() -> None:
    loss = DpoLoss(beta=0.5, label_smoothing=0.0, device=CPU)
    labels = torch.tensor([[1], [-100], [1], [-100]])  # two pairs: chosen of both, then rejected of both
    loss(torch.tensor([-1.0, -7.0, -3.0, -1.0]), torch.tensor([-2.0, -2.0, -2.0, -2.0]), labels)
    metrics = loss.take_metrics()
    assert metrics.labels_per_pair == 2.0
    assert list(metrics.rewards.values()) == [0.5, -0.5, 1.0, 1.0]
    again = loss.take_metrics()
    assert (again.rewards, again.labels_per_pair) == ({}, 0.0)


def test_an_adapter_is_off_in_the_context_alone_and_stays_trainable() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = inject_adapter_in_model(LoraConfig(target_modules=["0"], r=2), nn.Sequential(nn.Linear(4, 4)))
    hidden, plain = torch.ones(1, 4), model[0].base_layer
    nn.init.ones_(model[0].lora_B["default"].weight)
    adapted = model(hidden)
    assert not torch.equal(adapted, plain(hidden))

    def fail_halfway() -> None:
        with without_adapter(model):
            assert torch.equal(model(hidden), plain(hidden))
            assert model[0].lora_A["default"].weight.requires_grad
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert torch.equal(model(hidden), adapted)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_needs_an_operator_that_is_not_built_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.engines.deepspeed import base

    monkeypatch.setattr(base, "is_built", lambda name: False)
    context: Any = SimpleNamespace(run=SimpleNamespace(optimizer=AdamW(implementation="native")), is_main=True)
    with pytest.raises(
        EnvironmentProblem, match=r"fused_adam is not built here; run: python -m launcher\.ops fused_adam"
    ):
        base.choose_native_adam(context, Zero(stage=1), device=CPU)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("zero", "built", "said"),
    [
        (Zero(stage=1), False, "torch's fused AdamW\n"),
        (Zero(stage=2, offload_optimizer="cpu"), True, "DeepSpeed's cpu_adam\n"),
        (Zero(stage=2, offload_optimizer="cpu"), False, "in place of DeepSpeed's cpu_adam: it is not built on every"),
    ],
)
def test_rank_0_says_whose_adam_runs(
    zero: Zero, built: bool, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launcher.engines.deepspeed import base

    monkeypatch.setattr(base, "is_built", lambda name: built)
    monkeypatch.setattr(base, "read_build_outcome", lambda folder, name: None)
    context: Any = SimpleNamespace(run=SimpleNamespace(optimizer=AdamW()), is_main=True)
    assert base.choose_native_adam(context, zero, device=CPU) == built
    assert said in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_a_parameter_named_twice_is_read_once_from_nvme_however_often_that_is_set_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper as Swapper

    from launcher.engines.deepspeed.base import read_parameters_once

    read: list[list[nn.Parameter]] = []
    monkeypatch.setattr(Swapper, "swap_in", lambda self, params, async_op: read.append(params))
    one, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    read_parameters_once()
    replaced = Swapper.swap_in
    read_parameters_once()
    assert Swapper.swap_in is replaced, "wrapped once"
    Swapper.swap_in(None, [one, other, one], async_op=True)
    (params,) = read
    assert [id(each) for each in params] == [id(one), id(other)]


def test_log_probabilities_of_rows_and_their_gradient_are_torchs() -> None:
    from launcher.engines.loss import row_log_probs

    torch.manual_seed(0)
    labels = torch.tensor([[1, -100, 3], [0, 2, -100]])
    ours, expected = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    ours.requires_grad_()
    expected.requires_grad_()
    found = row_log_probs(ours, labels)
    chosen = torch.log_softmax(expected, dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    wanted = (chosen * (labels != -100)).sum(dim=-1)
    weights = torch.tensor([2.0, -1.0])
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert torch.allclose(found, wanted, atol=1e-6)  # fp32: sums of a few numbers below 10
    assert torch.allclose(ours.grad, expected.grad, atol=1e-6)
    assert ours.grad[0, 1].abs().max() == 0, "what does not count has no gradient"
