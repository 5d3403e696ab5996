"""``native.c``, compiled once a machine, and its arguments: matrices, steps, attention."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from launcher.errors import EnvironmentProblem
from launcher.inference.kernels.two_of_four import BLOCK, compress, is_two_of_four
from launcher.quantization.int4 import Int4Linear, levels
from launcher.utils.build_cache import build_once, default_cache_folder

if TYPE_CHECKING:
    from torch import Tensor


_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


class LinearStruct(Structure):
    """A packed matrix."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("weight", "bias")),
        *((name, c_int64) for name in ("out", "in_", "bits", "group")),
        *((name, c_void_p) for name in ("scale", "zero")),
        *((name, c_int64) for name in ("dynamic", "sparse")),
    ]


class LowRankStruct(Structure):
    """One adapter's update of a matrix."""

    _fields_: ClassVar = [("down", LinearStruct), ("up", LinearStruct)]


class AdapterRowsStruct(Structure):
    """Tokens of a step that have an adapter, by adapter."""

    _fields_: ClassVar = [("groups", c_int64), *((name, c_void_p) for name in ("adapter", "first", "tokens"))]


class BlockStruct(Structure):
    """A decoder block of Llama's make."""

    _fields_: ClassVar = [
        *((name, LinearStruct) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("qkv_low", "o_low", "gate_up_low", "down_low")),
        *((name, c_void_p) for name in ("norm1", "norm2")),
        *((name, c_float) for name in ("eps1", "eps2", "scale")),
        ("half", c_int32),
        *((name, c_int64) for name in ("width", "heads", "kv_heads", "dim", "mlp")),
    ]


class TokensStruct(Structure):
    """Where the tokens of a step are."""

    _fields_: ClassVar = [
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("slot_mapping", "seen", "row", "block_tables")),
        ("table_width", c_int64),
        *((name, c_void_p) for name in ("cos", "sin")),
    ]


def native_library(heartbeat: Callable[[], None] = lambda: None) -> Any:
    """Return the compiled library; the first call on a machine compiles it, in a few seconds.

    Raises:
        EnvironmentProblem: there is no C compiler, or it fails.
    """
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    if shutil.which(compiler[0]) is None:
        raise EnvironmentProblem(f"there is no C compiler ({compiler[0]}): apt-get install gcc, or set CC")
    made_of = [_SOURCE.read_bytes(), repr((compiler, _FLAGS)).encode(), _cpu_features().encode()]
    folder = default_cache_folder("native", hashlib.blake2b(b"".join(made_of), digest_size=12).hexdigest())

    def build(target: Path) -> None:
        command = [*compiler, *_FLAGS, "-o", str(target / "native.so"), str(_SOURCE), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EnvironmentProblem(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")

    return _load(build_once(folder, build, heartbeat=heartbeat) / "native.so")


@cache
def _load(file: Path) -> Any:
    library = ctypes.CDLL(str(file))
    library.native_block.argtypes = [POINTER(BlockStruct), POINTER(TokensStruct), *[c_void_p] * 6]
    library.native_linear.argtypes = [
        POINTER(LinearStruct),
        *[c_void_p] * 4,
        *[c_int64] * 2,
        c_void_p,
        c_int32,
    ]
    library.native_attention.argtypes = [
        POINTER(TokensStruct),
        *[c_void_p] * 6,
        *[c_int64] * 3,
        c_float,
        c_int32,
        c_void_p,
    ]
    for name in ("native_block", "native_linear", "native_attention"):
        getattr(library, name).restype = None
    return library


def _cpu_features() -> str:
    """Return the CPU features that decide the compiled instructions.

    Machines may share a home folder.
    """
    info = Path("/proc/cpuinfo")
    flags = (
        next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.is_file() else ""
    )
    return f"{platform.machine()} {flags}"


class PackedMatrix:
    """A matrix in panels, with its bias.

    Args:
        weights: (out, in) each, of one format; they are stacked.
        biases: (out) each, ``None`` where there is none.
        sparse: whether to keep two weights of each four inputs, where no more than that are not zero.

    Attributes:
        is_sparse: whether that is done.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None], *, sparse: bool = False) -> None:
        weight = torch.cat([part.detach() for part in weights])
        self.columns, inner = weight.shape
        self.is_sparse = sparse and is_two_of_four(weight)
        indexes = None
        if self.is_sparse:
            weight, indexes = compress(weight)
        panels = _to_panels(weight)
        if weight.dtype == torch.bfloat16:  # lane j holds outputs j and j + half a panel
            panels = panels.unflatten(-1, (2, -1)).transpose(2, 3)
        self.weight = panels.contiguous()
        if indexes is not None:
            self.weight = _with_indexes(self.weight.flatten().view(torch.int32), indexes)
        self.bias = _stacked_bias(weights, biases, _to_ints(self.columns))
        self.out, self.inner = _to_ints(self.columns), inner
        self.struct = LinearStruct(
            self.weight.data_ptr(), _address(self.bias), self.out, inner, 0, inner, None, None, 0, int(self.is_sparse)
        )


class PackedQuantizedMatrix:
    """A matrix of whole numbers in panels, with its scales and its bias.

    Args:
        layers: of one kind, each one for which :func:`is_packable` holds; they are stacked.
        sparse: whether to keep two of each four inputs of an 8-bit matrix, where no more than that are not zero.

    Attributes:
        is_sparse: whether that is done.
    """

    def __init__(self, layers: Sequence[nn.Module], *, sparse: bool = False) -> None:
        biases = [layer.bias for layer in layers]
        indexes = None
        if isinstance(layers[0], Int4Linear):
            numbers = torch.cat([levels(layer.qdata) for layer in layers])
            group = layers[0].group_size
            scale, zero = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("scale", "zero"))
            self._scale, self._zero = (_to_panels(part).contiguous() for part in (scale, zero))
            bits, zeros, dynamic = 4, self._zero.data_ptr(), 0
        else:
            numbers = torch.cat([layer.weight.data.qdata for layer in layers]).view(torch.uint8)
            group = numbers.shape[1]
            self._scale = torch.zeros(_to_ints(len(numbers)))
            self._scale[: len(numbers)] = torch.cat([layer.weight.data.scale.flatten() for layer in layers])
            bits, zeros, dynamic = 8, None, int(layers[0].weight.data.act_quant_kwargs is not None)
        self.columns, self.inner = numbers.shape
        self.is_sparse = sparse and bits == 8 and is_two_of_four(numbers)
        if self.is_sparse:
            numbers, indexes = compress(numbers)
        self.out = _to_ints(self.columns)
        self.bias = _stacked_bias([part.qdata if bits == 4 else part.weight for part in layers], biases, self.out)
        self.weight = _to_lanes(_to_panels(numbers), bits)
        if indexes is not None:
            self.weight = _with_indexes(self.weight, indexes)
        self.struct = LinearStruct(
            self.weight.data_ptr(),
            _address(self.bias),
            self.out,
            self.inner,
            bits,
            group,
            self._scale.data_ptr(),
            zeros,
            dynamic,
            int(self.is_sparse),
        )


def pack_layers(layers: Sequence[nn.Module], *, sparse: bool = False) -> PackedMatrix | PackedQuantizedMatrix:
    """Return the matrices of linear layers as one, stacked.

    Args:
        layers: to stack.
        sparse: whether to keep two of each four inputs, where no more than that are not zero.
    """
    if any(is_packable(layer) for layer in layers):
        return PackedQuantizedMatrix(layers, sparse=sparse)
    return PackedMatrix([layer.weight for layer in layers], [layer.bias for layer in layers], sparse=sparse)


def is_packable(layer: nn.Module) -> bool:
    """Return whether a layer's matrix is of whole numbers that ``native.c`` multiplies."""
    if isinstance(layer, Int4Linear):
        return layer.group_size % 4 == 0
    weight: Any = getattr(layer, "weight", None)
    return (
        type(weight).__name__ == "Int8Tensor"
        and _is_by_row(weight.act_quant_kwargs)
        and weight.act_pre_scale is None
        and weight.act_quant_scale is None
        and tuple(weight.block_size) == (1, weight.shape[1])
        and weight.shape[1] % 2 == 0
    )


def _is_by_row(activations: Any) -> bool:
    """Return whether activations are unquantized, or 8-bit, symmetric and scaled by row."""
    return activations is None or (
        type(activations.granularity).__name__ == "PerRow"
        and activations.mapping_type.name == "SYMMETRIC"
        and not activations.reduce_range
    )


def _to_panels(weight: Tensor) -> Tensor:
    """Return (panels, in, outputs of one) of (out, in), filled up with zeros."""
    panel = native_library().native_panel()
    out, inner = _to_ints(len(weight)), weight.shape[1]
    stacked = weight.new_zeros((out, inner))
    stacked[: len(weight)] = weight
    return stacked.view(out // panel, panel, inner).transpose(1, 2)


def _to_lanes(panels: Tensor, bits: int) -> Tensor:
    """Pack inputs of outputs j and j + half a panel into 32-bit lanes, least first.

    Args:
        panels: (panels, in, outputs of one) uint8.
        bits: of a number.
    """
    inputs = 16 // bits
    apart = panels.unflatten(2, (2, -1)).unflatten(1, (-1, inputs))  # panels, lanes, inputs, halves, half a panel
    apart = apart.permute(0, 1, 4, 2, 3).flatten(-2)  # panels, lanes, half a panel, numbers of a lane
    if bits == 4:
        apart = apart[..., 0::2] | (apart[..., 1::2] << 4)
    return apart.contiguous().view(torch.int32)[..., 0].contiguous()


def _with_indexes(lanes: Tensor, indexes: Tensor) -> Tensor:
    """Put the indexes of each 16 inputs before their kept weights.

    Args:
        lanes: int32, in the order of panels and inputs.
        indexes: (out, in / 2) of the kept weights, within groups of four.

    Returns:
        (panels, blocks of 16 inputs, rows of lanes, lanes of a row) int32.
    """
    panels = _to_panels(indexes).int()  # panels, kept inputs, outputs
    vector = panels.shape[2] // 2
    # panels, blocks, groups, kept inputs, halves of a panel, lanes
    apart = panels.unflatten(1, (-1, BLOCK // 4, 2)).unflatten(-1, (2, vector))
    places = torch.arange(0, 32, 8)[:, None, None] + torch.tensor([0, 2])[:, None] + torch.tensor([0, 4])
    words = (apart << places[..., None].int()).sum((2, 3, 4), dtype=torch.int32)
    kept = lanes.reshape(*words.shape[:2], -1, vector)
    return torch.cat([words[:, :, None], kept], dim=2).contiguous()


def _to_ints(columns: int) -> int:
    panel: int = native_library().native_panel()
    return -(-columns // panel) * panel


def _stacked_bias(parts: Sequence[Tensor], biases: Sequence[Tensor | None], out: int) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    stacked, start = torch.zeros(out), 0
    for part, bias in zip(parts, biases, strict=True):
        if bias is not None:
            stacked[start : start + len(part)] = bias.detach().float()
        start += len(part)
    return stacked


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Scratch:
    """Scratch memory of one call, shared by all layers, which are called one at a time."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def of(self, size: int) -> int:
        """Return the address of room for ``size`` floats."""
        if self._room.numel() < size:
            self._room = torch.empty(size)
        address: int = self._room.data_ptr()
        return address


class SegmentLayout(Protocol):
    """Consecutive tokens of one sequence, as the engine plans them."""

    @property
    def start(self) -> int:
        """Position of the first token in its sequence."""

    @property
    def tokens(self) -> Sequence[int]:
        """Ids of the tokens."""

    @property
    def block_table(self) -> Sequence[int]:
        """Blocks of the sequence, up to the last of these tokens."""

    @property
    def adapter(self) -> int:
        """Number of the sequence's adapter, from 1; 0 is the base model."""


class StepLayout(Protocol):
    """One forward pass, as the engine plans it."""

    @property
    def segments(self) -> Sequence[SegmentLayout]:
        """The sequences of the step."""

    @property
    def padding(self) -> int:
        """Number of tokens that belong to no sequence."""


class StepTable:
    """Block tables of the sequences of a step, and what each token sees of them.

    Args:
        plan: of the step.
        slot_mapping: where keys and values of each token go.
    """

    def __init__(self, plan: StepLayout, *, slot_mapping: Tensor) -> None:
        seen: list[int] = []
        row: list[int] = []
        width = max((len(part.block_table) for part in plan.segments), default=1)
        blocks: list[int] = []
        for index, part in enumerate(plan.segments):
            end = part.start + len(part.tokens)
            seen += range(part.start + 1, end + 1)
            row += [index] * len(part.tokens)
            blocks += part.block_table
            blocks += [0] * (width - len(part.block_table))
        seen += [0] * plan.padding
        row += [0] * plan.padding
        self._kept = [slot_mapping, *(torch.tensor(numbers or [0]) for numbers in (seen, row, blocks))]
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._struct = TokensStruct(len(seen), *(tensor.data_ptr() for tensor in self._kept), width, None, None)

    def with_rotary(self, rotary: tuple[Tensor, Tensor] | None) -> TokensStruct:
        """Return it with cosines and sines; all layers of a step are given the same."""
        if rotary is not None and self._rotary is None:
            self._rotary = (rotary[0].contiguous(), rotary[1].contiguous())
            self._struct.cos, self._struct.sin = (part.data_ptr() for part in self._rotary)
        return self._struct


VECTOR_WIDTH = 16
"""Widths of heads must be multiples of this, the most numbers in a register of any machine."""
MAX_GROUP_SIZE = 16
"""Heads that may share keys."""


class NativeAttention:
    """Computes attention of one step.

    Args:
        scratch: shared room.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch, self._call = scratch, native_library().native_attention

    def attend(
        self,
        tokens: TokensStruct,
        of_tokens: tuple[Tensor, Tensor, Tensor],
        arenas: tuple[Tensor, Tensor],
        *,
        scale: float | None,
    ) -> Tensor:
        """Write keys and values; return each token's attention over its sequence.

        The shape is (1, tokens, heads, width).

        Args:
            tokens: where they are.
            of_tokens: queries, keys and values of this step; (1, heads, tokens, width) each.
            arenas: keys and values of all pages; kernels lay them out in their own way.
            scale: of scores.
        """
        query, key, value = (part[0].transpose(0, 1).contiguous() for part in of_tokens)
        out = torch.empty_like(query)
        _, heads, dim = query.shape
        self._call(
            byref(tokens),
            *(part.data_ptr() for part in (query, key, value, out, *arenas)),
            heads,
            key.shape[1],
            dim,
            dim**-0.5 if scale is None else scale,
            int(query.dtype == torch.bfloat16),
            self._scratch.of(2 * (query.numel() + key.numel())),
        )
        return out[None]
