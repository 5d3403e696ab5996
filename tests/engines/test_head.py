"""The loss made in the output head, against the plain one: the same numbers, and never all logits in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.data.dataloader import MicroBatch
from launcher.engines import loss as cross_entropy
from launcher.engines.generate import generate_greedily
from launcher.engines.loss import token_loss_sum

VOCABULARY, WIDTH, TOKENS, SEQUENCES = 211, 32, 24, 3
LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": WIDTH, "n_positions": 64, "vocab_size": VOCABULARY}
FUSED = {
    "gpt2": transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0),
    "llama": transformers.LlamaConfig(**LLAMA),
    "llama tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**LLAMA),
    "qwen2": transformers.Qwen2Config(**LLAMA),
    "qwen3": transformers.Qwen3Config(**LLAMA),
}
OTHERS = {
    "gemma2": transformers.Gemma2Config(**LLAMA, attn_implementation="eager"),  # caps its logits
    "phi": transformers.PhiConfig(**LLAMA),  # has a bias in its head
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * VOCABULARY * 7)  # 7 does not divide the tokens


def model(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()  # GPT-2 has dropout


def micro_batch() -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, TOKENS + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, :9] = -100
    labels[2] = -100
    return MicroBatch(input_ids=ids[:, :-1], labels=labels)


def plain(module: nn.Module, batch: MicroBatch) -> Tensor:
    logits = module(input_ids=batch.input_ids, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-100, reduction="sum"
    )


def gradients(module: nn.Module, loss: Tensor, factor: float = 0.25) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    (loss * factor).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def error(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of any parameter's gradient, relative to its norm."""
    assert ours.keys() == expected.keys()
    whole = max(float(value.norm()) for value in expected.values())  # some are zero but for rounding: keys' biases
    return max(float((ours[n] - expected[n]).norm() / max(expected[n].norm(), 1e-3 * whole)) for n in expected)


@pytest.mark.parametrize("config", [*FUSED.values(), *OTHERS.values()], ids=[*FUSED, *OTHERS])
def test_loss_and_every_gradient_are_those_of_the_plain_one(config: Any) -> None:
    module, batch = model(config), micro_batch()
    names = list(module.state_dict())
    ours, expected = token_loss_sum(module, batch, device=CPU), plain(module, batch)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    assert error(gradients(module, ours), gradients(module, expected)) < 1e-6
    with torch.no_grad():
        assert token_loss_sum(module, batch, device=CPU).item() == pytest.approx(expected.item(), rel=1e-6)
    assert list(module.state_dict()) == names
    assert "forward" not in vars(module.get_output_embeddings())


def test_logits_are_of_the_labels_that_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and padding cost no product with the vocabulary."""
    rows = []
    log_softmax = cross_entropy._log_softmax

    def counted(logits: Tensor) -> Tensor:
        rows.append(len(logits))
        return log_softmax(logits)

    monkeypatch.setattr(cross_entropy, "_log_softmax", counted)
    batch = micro_batch()
    token_loss_sum(model(FUSED["llama"]), batch, device=CPU)
    assert sum(rows) == int((batch.labels != -100).sum()) == 2 * TOKENS - 9
    nothing = MicroBatch(input_ids=batch.input_ids, labels=torch.full_like(batch.labels, -100))
    module = model(FUSED["llama"])
    loss = token_loss_sum(module, nothing, device=CPU)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(module, loss).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_under_autocast_they_agree_as_far_as_the_format_goes(name: str, dtype: torch.dtype) -> None:
    module, batch = model({**FUSED, **OTHERS}[name]), micro_batch()
    with torch.autocast("cpu", dtype=dtype):
        ours, expected = token_loss_sum(module, batch, device=CPU), plain(module, batch)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)  # the same products in the same format
    assert error(gradients(module, ours), gradients(module, expected)) < 4 * torch.finfo(dtype).eps


def test_half_precision_weights_as_deepspeed_holds_them() -> None:
    module, batch = model(FUSED["llama"]).to(torch.bfloat16), micro_batch()
    ours, expected = token_loss_sum(module, batch, device=CPU), plain(module, batch)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(module, ours)
    assert found["lm_head.weight"].dtype == torch.bfloat16
    assert error(found, gradients(module, expected)) < 4 * torch.finfo(torch.bfloat16).eps


def test_a_frozen_head_and_a_frozen_body() -> None:
    batch = micro_batch()
    for frozen in ("lm_head", "model"):
        module = model(FUSED["llama"])
        getattr(module, frozen).requires_grad_(False)
        ours, expected = token_loss_sum(module, batch, device=CPU), plain(module, batch)
        assert error(gradients(module, ours), gradients(module, expected)) < 1e-6


def test_the_head_is_itself_again_after_an_error() -> None:
    module = model(FUSED["gpt2"])
    bad = MicroBatch(input_ids=torch.tensor([[VOCABULARY + 5]]), labels=torch.tensor([[1]]))
    with pytest.raises(IndexError):
        token_loss_sum(module, bad, device=CPU)
    ids = torch.arange(4).view(1, 4)
    assert generate_greedily(module.eval(), ids, max_new_tokens=3).shape == (1, 7)
    assert module(input_ids=ids).logits.shape == (1, 4, VOCABULARY)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, by format."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements[tensor.dtype] = max(self.elements.get(tensor.dtype, 0), tensor.numel())
        return result


@contextlib.contextmanager
def largest() -> Iterator[dict[torch.dtype, int]]:
    with Largest() as mode:
        yield mode.elements


@pytest.mark.parametrize(("name", "in_half"), [("gpt2", False), ("llama", False), ("gemma2", True)])
def test_logits_never_exist_as_a_whole_in_fp32(name: str, in_half: bool) -> None:
    """The families that compute more than a product have them once, in the format they compute in."""
    config = {**FUSED, **OTHERS}[name]
    long = torch.arange(2400).view(120, 20) % VOCABULARY  # short, so that attention stays below the logits
    batch, module = MicroBatch(input_ids=long, labels=long), model(config)
    every_logit = long.numel() * VOCABULARY
    with largest() as elements, torch.autocast("cpu", dtype=torch.bfloat16):
        token_loss_sum(module, batch, device=CPU).backward()
    assert elements[torch.float32] < every_logit
    assert (elements[torch.bfloat16] >= every_logit) == in_half
    with largest() as elements, torch.autocast("cpu", dtype=torch.bfloat16):
        plain(module, batch).backward()
    assert elements[torch.float32] >= every_logit, "the plain loss would have been seen"
