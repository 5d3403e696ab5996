import pytest

from launcher.config.model.gpt2 import Gpt2
from launcher.config.model.llama import SMOLLM2_SIZES
from launcher.config.optimizer import AdamW
from launcher.config.parallel.data_parallel import Fsdp
from launcher.config.precision import Bf16Precision, Fp32Precision
from launcher.errors import ConfigErrors

GPT2 = Gpt2(
    name="small", num_hidden_layers=4, num_attention_heads=6, hidden_size=96, max_position_embeddings=64, vocab_size=512
).shape()
SMOLLM2 = SMOLLM2_SIZES.shape()


def refusals(strategy, shape, world_size):
    return [str(error) for error in strategy.validate_run(world_size, Fp32Precision(), optimizer=AdamW(), shape=shape)]


def test_shards_take_what_other_degrees_leave():
    assert str(Fsdp(replicate=2, tensor=2).dims(16)) == "data 2 × shard 4 × tensor 2 = 16"
    assert Fsdp(sequence_parallel=4).data_parallel(8) == 2


def test_state_is_spread_over_all_that_hold_shares():
    quarter, half = -(-GPT2.num_params // 4), GPT2.num_params // 2
    state = Fsdp(sequence_parallel=2).state_bytes(GPT2, 4, Bf16Precision())
    assert (state.total, state.host) == (pytest.approx(16 * quarter, rel=1e-4), 0)
    assert Fsdp(replicate=2, offload="cpu").state_bytes(GPT2, 4, Bf16Precision()).host == pytest.approx(
        16 * half, rel=1e-4
    )


def test_tensor_ranks_hold_embeddings_whole():
    blocks = SMOLLM2.num_hidden_layers * SMOLLM2.block_params
    held = Fsdp(tensor=3).state_bytes(SMOLLM2, 3, Bf16Precision()).total / 16
    assert held == pytest.approx(blocks / 3 + SMOLLM2.num_params - blocks, rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "shape", "parts"),
    [
        (
            Fsdp(tensor=2),
            SMOLLM2,
            ("parallel.tensor=2", "9 heads, 3 heads of keys", "tensor=1 or parallel.tensor=3"),
        ),
        (Fsdp(tensor=2), GPT2, ("parallel.tensor=2", "no tensor plan for GPT-2")),
        (
            Fsdp(sequence_parallel=4),
            GPT2,
            ("parallel.sequence_parallel=4", "6 heads", "parallel.sequence_parallel=3 or parallel.sequence_parallel=6"),
        ),
        (Fsdp(replicate=4), GPT2, ("parallel.replicate=4", "nothing to shard", "parallel=ddp")),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_can(strategy, shape, parts):
    (error,) = refusals(strategy, shape, 4)
    assert all(part in error for part in parts), error


def test_legal_degrees_are_not_refused():
    assert refusals(Fsdp(tensor=3), SMOLLM2, 3) == []
    assert refusals(Fsdp(sequence_parallel=2), GPT2, 4) == []


def test_heads_are_cut_once():
    with pytest.raises(ConfigErrors, match="already splits the heads"):
        Fsdp(sequence_parallel=2, tensor=2)
