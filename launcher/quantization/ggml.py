"""Weights in the formats of llama.cpp (ggml): blocks of a row with a scale each.

The package ``gguf`` has q8_0, q5_0, q4_1 and q4_0 in numpy; q4_k, which it only reads, is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_SUPER, _SUB = 256, 32
"""Weights of a block of q4_k, and those that share a scale and a minimum."""
_AT_ONCE = 4096
"""Blocks that are quantized at a time: 4 MiB of weights."""
_LEVELS, _SCALE_LEVELS = 15, 63
_STEPS = 20


def stored_type(name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    """Return the format of one tensor in a file of weights in ``dtype``.

    Vectors and learned positions stay in fp32, as llama.cpp's converter has them. In a file of 4 bits the embedding
    and the head have 8: both choose tokens. Rows that 256 does not divide take q5_0 instead of q4_k, as llama.cpp's
    quantizer does; those that 32 does not divide stay in fp16.

    Args:
        name: in the file, as ``blk.0.attn_q.weight``.
        shape: (rows, columns).
        dtype: of the file, as ``q4_k``.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or name.startswith("position_embd"):
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[{"fp32": "F32", "fp16": "F16", "bf16": "BF16"}.get(dtype, dtype.upper())]
    if dtype.startswith("q4") and name in ("token_embd.weight", "output.weight"):
        kind = GGMLQuantizationType.Q8_0
    columns = shape[-1]
    if kind is GGMLQuantizationType.Q4_K and columns % _SUPER:
        kind = GGMLQuantizationType.Q5_0
    return GGMLQuantizationType.F16 if columns % GGML_QUANT_SIZES[kind][0] else kind


def quantized(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return the bytes of fp32 weights in a format: (rows, bytes of a row).

    Args:
        values: (rows, columns), the columns a multiple of the format's block.
        kind: of the result; the three float formats come as numpy's, but for bf16, which comes as bytes.
    """
    from gguf import GGMLQuantizationType
    from gguf import quantize as quantize_blocks

    if kind is GGMLQuantizationType.Q4_K:
        blocks: np.ndarray = values.astype(np.float32, copy=False).reshape(-1, _SUPER)
        parts = [_q4_k(blocks[start : start + _AT_ONCE]) for start in range(0, len(blocks), _AT_ONCE)]
        packed: np.ndarray = np.concatenate(parts).reshape(len(values), -1)
        return packed
    found: np.ndarray = quantize_blocks(np.ascontiguousarray(values, dtype=np.float32), kind)
    return found


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """Return blocks of 256 weights in 144 bytes each.

    As ``quantize_row_q4_K_ref`` of llama.cpp's ggml-quants.c does.

    A weight is d * scale * level - dmin * minimum, with a level of 4 bits and, for 32 weights, a scale and a minimum of
    6 bits.
    """
    count = len(blocks)
    parts = blocks.reshape(-1, _SUB)
    scales, minima = (found.reshape(count, -1) for found in _scales_and_minima(parts))
    factors, codes = zip(*(_in_six_bits(found) for found in (scales, minima)), strict=True)
    step, offset = (
        factor.astype(np.float32)[:, None] * code.astype(np.float32)
        for factor, code in zip(factors, codes, strict=True)
    )
    grouped = blocks.reshape(count, -1, _SUB)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.rint((grouped + offset[..., None]) / step[..., None])
    levels = np.where(step[..., None] == 0, 0, np.clip(levels, 0, _LEVELS)).astype(np.uint8)
    pairs = levels.reshape(count, -1, 2, _SUB)
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(count, -1)
    heads = [factor[:, None].view(np.uint8) for factor in factors]
    found: np.ndarray = np.concatenate([*heads, _pack_six_bits(*codes), packed], axis=1)
    return found


def _scales_and_minima(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and the minimum, as a positive number, of each row.

    They are found by weighted least squares:

    ``make_qkx2_quants`` of llama.cpp's ggml-quants.c, with the arguments that q4_k has.
    """
    weights = np.sqrt(np.mean(x * x, axis=1, keepdims=True)) + np.abs(x)
    sum_w, sum_x = weights.sum(axis=1), (weights * x).sum(axis=1)
    low, high = np.minimum(x.min(axis=1), 0), x.max(axis=1)
    span = high - low
    is_flat = span == 0
    span = np.where(is_flat, 1, span).astype(np.float32)

    def levels_at(inverse: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.clip(np.rint(inverse[:, None] * (x - low[:, None])), 0, _LEVELS)
        return found

    def error_of(levels: np.ndarray, scale: np.ndarray, least: np.ndarray) -> np.ndarray:
        error = scale[:, None] * levels + least[:, None] - x
        found: np.ndarray = (weights * error * error).sum(axis=1)
        return found

    scale, least = span / _LEVELS, low.copy()
    best = error_of(levels_at(_LEVELS / span), scale, least)
    for step in range(_STEPS + 1):
        levels = levels_at((np.float32(_LEVELS - 1 + 0.1 * step)) / span)
        sum_l, sum_l2 = (weights * levels).sum(axis=1), (weights * levels * levels).sum(axis=1)
        sum_xl = (weights * levels * x).sum(axis=1)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        is_solvable = determinant > 0
        divisor = np.where(is_solvable, determinant, 1)
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / divisor
        new_least = (sum_l2 * sum_x - sum_l * sum_xl) / divisor
        is_above = new_least > 0
        new_scale = np.where(is_above, sum_xl / np.where(sum_l2 > 0, sum_l2, 1), new_scale)
        new_least = np.where(is_above, 0, new_least)
        error = error_of(levels, new_scale, new_least)
        is_better = is_solvable & (error < best)
        best, scale, least = (
            np.where(is_better, new, old) for new, old in ((error, best), (new_scale, scale), (new_least, least))
        )
    return np.where(is_flat, 0, scale).astype(np.float32), -np.where(is_flat, low, least).astype(np.float32)


def _in_six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the factor of each block, in fp16, and its values as multiples of it, at most 63."""
    most = np.maximum(values.max(axis=1), 0)
    inverse = np.where(most > 0, _SCALE_LEVELS / np.where(most > 0, most, 1), 0).astype(np.float32)
    codes = np.clip(np.rint(inverse[:, None] * values), 0, _SCALE_LEVELS).astype(np.uint8)
    return (most / np.float32(_SCALE_LEVELS)).astype(np.float16), codes


def _pack_six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Return eight scales and eight minima of a block in 12 bytes, in ggml's order."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    found: np.ndarray = np.concatenate([first, second, third], axis=1)
    return found
