"""DeepSpeed's fp32 weights and moments as parts of whole tensors.

DeepSpeed's optimizers update buffers (master weights), in which parts of parameters lie one behind another: all of them
without ZeRO, this rank's partition with it. Under Infinity a buffer is in a file on NVMe between steps.

Imports DeepSpeed, so it comes after ``prepare_environment``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch import distributed as dist

from launcher.checkpoint.regions import Box, FlatRange
from launcher.checkpoint.tensors import Shard, StoredState
from launcher.engines.distributed import share_partitions
from launcher.engines.state import check_shape

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of each weight, the only optimizer that DeepSpeed runs here."""

_WEIGHTS = ""

_NEGLIGIBLE = 2.0**-27
"""A number that is nothing beside 1 in fp32."""


@dataclass(frozen=True)
class _Part:
    """A part of a parameter in a buffer."""

    parameter: nn.Parameter
    start: int
    """Its first element in the flattened parameter."""
    numel: int
    offset: int
    """Its first element in the buffer."""


class MasterBuffer:
    """A tensor that the optimizer updates on this rank, with its moments.

    Args:
        optimizer: torch's or DeepSpeed's Adam, whose state it is.
        weights: the tensor, fp32 or, with ``parallel.low_memory_bf16``, bf16.
        parameters: of which it has a part, or another rank has.
        parts: that it consists of.
        counted_with: tensors of which the optimizer counts the steps once, in the state of any.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Tensor,
        *,
        parameters: Sequence[nn.Parameter],
        parts: Sequence[_Part],
        counted_with: Sequence[Tensor] = (),
    ) -> None:
        self._optimizer, self._weights, self._counted_with = optimizer, weights, counted_with
        self.parameters, self.parts = parameters, parts

    def read(self, key: str, part: _Part) -> Tensor:
        """Return a part of the weights or of a moment as fp32, one dimension, on any device."""
        if key != _WEIGHTS and not self._state:
            return torch.zeros(part.numel)
        tensor = self._weights if key == _WEIGHTS else self._state[key]
        return self._read(tensor, part).float()

    def _read(self, tensor: Tensor, part: _Part) -> Tensor:
        return tensor.detach().view(-1).narrow(0, part.offset, part.numel)

    @property
    def step(self) -> int:
        """Updates so far."""
        states = (self._optimizer.state.get(tensor, {}) for tensor in (self._weights, *self._counted_with))
        return max(int(state.get("step", 0)) for state in states)

    @contextmanager
    def opened(self) -> Iterator[dict[str, Tensor]]:
        """Bring weights (under an empty key) and moments into memory, to be overwritten."""
        if not self._state:
            self._create_state()
        tensors = {_WEIGHTS: self._weights, **{key: self._state[key] for key in MOMENTS}}
        yield {key: tensor.detach().view(-1) for key, tensor in tensors.items()}

    def set_step(self, step: int) -> None:
        """Set the number of updates; call it after :meth:`opened`."""
        if isinstance(self._state["step"], Tensor):
            self._state["step"].fill_(step)
        else:
            self._state["step"] = step

    def replay_steps(self, heartbeat: Callable[[], None]) -> None:
        """Have DeepSpeed's compiled Adam for CPUs count the steps taken.

        It keeps powers of the betas and multiplies them at each step; at a step that is not the next one it computes
        them at once, which rounds otherwise. So it takes the steps with a number that nothing uses. Once the powers no
        longer change ``1 - power`` there is nothing to do.
        """
        if isinstance(self._optimizer, torch.optim.AdamW) or self._weights.device.type != "cpu":
            return
        groups = self._optimizer.param_groups
        if max(groups[0]["betas"]) ** self.step < _NEGLIGIBLE:
            return
        unused = torch.zeros(1)
        unused.grad = torch.zeros(1)
        self._optimizer.param_groups = [{**groups[0], "params": [unused]}]
        for number in range(self.step):
            self._optimizer.step()
            if number % 1000 == 0:
                heartbeat()
        self._optimizer.param_groups = groups
        self._optimizer.state.pop(unused, None)

    @property
    def _state(self) -> dict[str, Any]:
        found: dict[str, Any] = self._optimizer.state.get(self._weights, {})
        return found

    def _create_state(self) -> None:
        """Create what the first step would."""
        keeps_fp32 = getattr(self._optimizer, "fp32_optimizer_states", False)
        dtype = torch.float32 if keeps_fp32 else self._weights.dtype
        is_torch = isinstance(self._optimizer, torch.optim.AdamW)
        step = torch.zeros((), dtype=torch.float32, device=self._weights.device) if is_torch else 0
        moments = {key: torch.zeros_like(self._weights, dtype=dtype, requires_grad=False) for key in MOMENTS}
        self._optimizer.state[self._weights] = {"step": step, **moments}


class _Stage3Buffer(MasterBuffer):
    """A sub-group of ZeRO-3, in memory; the partitioned parameters follow what is written."""

    def __init__(self, zero: DeepSpeedZeroOptimizer_Stage3, number: int) -> None:
        self._zero, self._number = zero, number
        parameters = zero.fp16_groups[number]
        super().__init__(
            zero.optimizer,
            zero.fp32_partitioned_groups_flat[number],
            parameters=parameters,
            parts=list(_stage3_parts(parameters, rank=dist.get_rank(zero.dp_process_group))),
        )

    @contextmanager
    def opened(self) -> Iterator[dict[str, Tensor]]:
        with super().opened() as tensors:
            yield tensors
            self._zero._reassign_or_swap_out_partitioned_parameters(self._number)  # noqa: SLF001  (as its step does)


class _SwappedBuffer(_Stage3Buffer):
    """A sub-group of ZeRO-Infinity; each part is read from its file on NVMe when it is written."""

    def _read(self, tensor: Tensor, part: _Part) -> Tensor:
        swapped = self._zero.optimizer_swapper.swap_params_info[self._weights.ds_id]
        (path,) = (Path(context.swap_path) for context in swapped.tensors if context.compute_tensor is tensor)
        return read_swapped(path, dtype=swapped.dtype(), start=part.offset, numel=part.numel)

    @contextmanager
    def opened(self) -> Iterator[dict[str, Tensor]]:
        swapper = self._zero.optimizer_swapper
        swapper.swap_in_optimizer_state(parameter=self._weights, async_parameter=None)
        with super().opened() as tensors:
            yield tensors
        swapper.swap_out_optimizer_state(parameter=self._weights, async_swap=False)
        self._weights.grad = None


def read_swapped(path: Path, *, dtype: torch.dtype, start: int, numel: int) -> Tensor:
    """Return elements of a swap file.

    Raises:
        OSError: it is shorter.
    """
    values = torch.empty(numel, dtype=dtype)
    room = memoryview(values.view(torch.uint8).numpy())
    with path.open("rb", buffering=0) as file:
        file.seek(start * dtype.itemsize)
        while room:
            if not (num_read := file.readinto(room)):
                raise OSError(f"{path} ends early")
            room = room[num_read:]
    return values


def master_buffers(optimizer: Any) -> list[MasterBuffer]:
    """Return the buffers of one of DeepSpeed's optimizers, or of torch's that it uses as it is."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return [
            (_SwappedBuffer if _is_swapped(optimizer, numel) else _Stage3Buffer)(optimizer, number)
            for number, numel in enumerate(optimizer.fp16_partitioned_groups_flat_numel)
        ]
    if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer | FP16_Optimizer):
        return [
            MasterBuffer(
                optimizer.optimizer,
                flat,
                parameters=parameters,
                parts=list(_flat_parts(parameters, offsets, first=first, last=first + flat.numel())),
            )
            for flat, parameters, offsets, first in _flat_groups(optimizer)
        ]
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        pairs = [pair for one, other in groups for pair in zip(one, other, strict=True)]
        return [_whole_buffer(optimizer.optimizer, master, parameter) for parameter, master in pairs]
    assert isinstance(optimizer, torch.optim.Optimizer), type(optimizer)
    counts_by_group = not isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's fused Adam
    return [
        _whole_buffer(optimizer, parameter, parameter, counted_with=group["params"] if counts_by_group else ())
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def _is_swapped(zero: DeepSpeedZeroOptimizer_Stage3, numel: int) -> bool:
    return bool(zero.swap_optimizer and zero.optimizer_swapper.is_swappable_tensor(numel=numel))


def _whole_buffer(
    optimizer: torch.optim.Optimizer, weights: Tensor, parameter: nn.Parameter, *, counted_with: Sequence[Tensor] = ()
) -> MasterBuffer:
    part = _Part(parameter, start=0, numel=parameter.numel(), offset=0)
    return MasterBuffer(optimizer, weights, parameters=[parameter], parts=[part], counted_with=counted_with)


_Group = tuple[Tensor, Sequence[nn.Parameter], Sequence[int], int]


def _flat_groups(optimizer: Any) -> Iterator[_Group]:
    """Yield each buffer, its parameters, where these begin, and where the buffer begins.

    Beginnings count from the start of all ranks' buffers in a row.
    """
    if isinstance(optimizer, FP16_Optimizer):
        for flat, parameters in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            yield flat, parameters, _offsets(parameters), 0
        return
    if isinstance(optimizer, BF16_Optimizer):
        buffers, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    else:
        buffers, groups = optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_groups
    padded = getattr(optimizer, "round_robin_bit16_offsets", [_offsets(parameters) for parameters in groups])
    ranks = map(dist.get_rank, optimizer.real_dp_process_group)
    for flat, parameters, offsets, rank in zip(buffers, groups, padded, ranks, strict=True):
        yield flat, parameters, offsets, rank * flat.numel()


def _offsets(parameters: Sequence[nn.Parameter]) -> list[int]:
    sizes = [parameter.numel() for parameter in parameters]
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _flat_parts(
    parameters: Sequence[nn.Parameter], offsets: Sequence[int], *, first: int, last: int
) -> Iterator[_Part]:
    """Yield the parts of parameters that lie from ``first`` to ``last`` (exclusive)."""
    for parameter, offset in zip(parameters, offsets, strict=True):
        start, stop = max(first, offset), min(last, offset + parameter.numel())
        if start < stop:
            yield _Part(parameter, start=start - offset, numel=stop - start, offset=start - first)


def _stage3_parts(parameters: Sequence[Any], *, rank: int) -> Iterator[_Part]:
    """Yield this rank's partition of each parameter, without padding."""
    offset = 0
    for parameter in parameters:
        size = parameter.partition_numel()
        start = rank * size
        if (numel := min(size, parameter.ds_numel - start)) > 0:
            yield _Part(parameter, start=start, numel=numel, offset=offset)
        offset += size


def _region(part: _Part) -> FlatRange:
    return FlatRange(part.start, part.start + part.numel)


def _values_of(buffers: Sequence[MasterBuffer]) -> Iterator[tuple[_Part, str]]:
    """Yield each part with the keys of its values: weights and moments."""
    for buffer in buffers:
        yield from itertools.product(buffer.parts, (_WEIGHTS, *MOMENTS))


def _frozen_region(parameter: Any) -> FlatRange:
    """Return which part of an untrained parameter this rank holds."""
    if not hasattr(parameter, "ds_tensor"):
        return FlatRange(0, parameter.numel())
    size = parameter.partition_numel()
    start = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return FlatRange(start, min(start + size, parameter.ds_numel))


def _read_frozen(parameter: Any) -> Tensor:
    """Return this rank's part of an untrained parameter as fp32, one dimension."""
    numel = _frozen_region(parameter).numel
    if _is_on_nvme(parameter):
        path = Path(parameter.nvme_swapper.get_path(parameter, must_exist=True))
        return read_swapped(path, dtype=parameter.dtype, start=0, numel=numel).float()
    return _frozen_values(parameter)[:numel].float()


def _load_frozen(parameter: Any, source: StoredState, name: str) -> None:
    swapper, region = parameter.nvme_swapper if _is_on_nvme(parameter) else None, _frozen_region(parameter)
    if swapper is not None:
        swapper.swap_in([parameter], async_op=False)
    source.read_into(_frozen_values(parameter)[: region.numel], name, region)
    if swapper is not None:
        swapper.swap_out_and_release([parameter])


def _frozen_values(parameter: Any) -> Tensor:
    values: Tensor = getattr(parameter, "ds_tensor", parameter)
    return values.detach().view(-1)


def _is_on_nvme(parameter: Any) -> bool:
    partition = getattr(parameter, "ds_tensor", None)
    return getattr(partition, "status", None) is PartitionedParamStatus.NOT_AVAILABLE


class MasterState:
    """Weights and moments of a DeepSpeed engine by their names in the whole model.

    Args:
        optimizer: DeepSpeed's, or torch's.
        names: of parameters in the whole model; a tied one has its first name.
        saved_elsewhere: parameters of which another rank saves a copy.
        adapter_only: whether checkpoints hold trained parameters alone.
    """

    def __init__(
        self,
        optimizer: Any,
        names: Mapping[nn.Parameter, str],
        *,
        saved_elsewhere: Sequence[nn.Parameter] = (),
        adapter_only: bool = False,
    ) -> None:
        self._optimizer, self._names, self._adapter_only = optimizer, names, adapter_only
        self._saved_elsewhere = set(saved_elsewhere)

    def shards(self) -> list[Shard]:
        """Return this rank's parts."""
        buffers = master_buffers(self._optimizer)
        shards = [shard for buffer in buffers for shard in self._shards_of(buffer)]
        for parameter in self._frozen(buffers):
            region, read = _frozen_region(parameter), partial(_read_frozen, parameter)
            if region.numel and parameter not in self._saved_elsewhere:
                name, shape = self._names[parameter], _shape(parameter)
                shards.append(Shard(name=name, shape=shape, region=region, dtype=torch.float32, read=read))
        return shards

    def _frozen(self, buffers: Sequence[MasterBuffer]) -> list[nn.Parameter]:
        """Return the parameters of checkpoints that the optimizer does not update."""
        if self._adapter_only:
            return []
        updated = {parameter for buffer in buffers for parameter in buffer.parameters}
        return [parameter for parameter in self._names if parameter not in updated]

    def _shards_of(self, buffer: MasterBuffer) -> Iterator[Shard]:
        step = torch.tensor(float(buffer.step))
        for part in buffer.parts:
            if part.parameter in self._saved_elsewhere:
                continue
            name, shape = self._names[part.parameter], _shape(part.parameter)
            region = _region(part)
            for key in (_WEIGHTS, *MOMENTS):
                read = partial(buffer.read, key, part)
                yield Shard(name=_name(key, name), shape=shape, region=region, dtype=torch.float32, read=read)
            yield Shard(name=_name("step", name), shape=(), region=Box((), ()), dtype=torch.float32, read=step.clone)

    def load(self, source: StoredState, *, heartbeat: Callable[[], None] = lambda: None) -> None:
        """Take this rank's parts out of a checkpoint.

        All ranks call it together.

        Raises:
            ValueError: the checkpoint does not hold this model and optimizer.
        """
        buffers = master_buffers(self._optimizer)
        for buffer in buffers:
            for parameter in buffer.parameters:
                check_shape(source, _name("step", self._names[parameter]), ())
                for key in (_WEIGHTS, *MOMENTS):
                    check_shape(source, _name(key, self._names[parameter]), _shape(parameter))
        frozen = self._frozen(buffers)
        for parameter in frozen:
            check_shape(source, self._names[parameter], _shape(parameter))
        source.expect((_name(key, self._names[part.parameter]), _region(part)) for part, key in _values_of(buffers))
        source.expect((self._names[parameter], _frozen_region(parameter)) for parameter in frozen)
        if isinstance(self._optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._optimizer.checkpoint_event_prologue()  # partitions all parameters
        with torch.no_grad():
            for buffer in buffers:
                self._fill(buffer, source, heartbeat)
            for parameter in frozen:
                _load_frozen(parameter, source, self._names[parameter])
                heartbeat()
            _update_copies(self._optimizer)
            buffers[0].replay_steps(heartbeat)

    def _fill(self, buffer: MasterBuffer, source: StoredState, heartbeat: Callable[[], None]) -> None:
        with buffer.opened() as tensors:
            for part in buffer.parts:
                region = _region(part)
                for key, tensor in tensors.items():
                    name = _name(key, self._names[part.parameter])
                    source.read_into(tensor.narrow(0, part.offset, part.numel), name, region)
                heartbeat()
        # of torch's optimizers each parameter counts for itself, and one without a gradient does not count at all
        steps = [source.read(_name("step", self._names[parameter])).item() for parameter in buffer.parameters]
        buffer.set_step(int(max(steps)))


def _update_copies(optimizer: Any) -> None:
    """Make the weights that passes use equal to the master weights, on all ranks."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_epilogue()  # gathers small parameters
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        _share_masters(optimizer)  # not update_lp_params, which gathers
    elif isinstance(optimizer, FP16_Optimizer):
        for buffer in master_buffers(optimizer):
            for part in buffer.parts:
                part.parameter.copy_(buffer.read(_WEIGHTS, part).view_as(part.parameter))
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            torch._foreach_copy_(list(parameters), list(masters))


def _share_masters(optimizer: Any) -> None:
    """Copy the master weights of each rank's partition to the weights of all ranks."""
    if isinstance(optimizer, BF16_Optimizer):
        partitions, masters = optimizer.bf16_partitioned_groups, optimizer.fp32_groups_flat_partition
    else:
        partitions = optimizer.parallel_partitioned_bit16_groups
        masters = optimizer.single_partition_of_fp32_groups
    for weights, own, group in zip(partitions, masters, optimizer.real_dp_process_group, strict=True):
        weights[dist.get_rank(group)].data.copy_(own.data)
        share_partitions(weights, group)


def _name(key: str, parameter: str) -> str:
    return f"{key}.{parameter}" if key else parameter


def _shape(parameter: Any) -> tuple[int, ...]:
    """Return the whole shape; under ZeRO-3 a parameter is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
