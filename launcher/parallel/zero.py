"""ZeRO: optimiser state, gradients and parameters partitioned over the data-parallel ranks, by DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from launcher.batch import Batch
from launcher.errors import ConfigError
from launcher.models.base import Shape
from launcher.optim.adamw import AdamW
from launcher.parallel import ds_config, zero_memory
from launcher.parallel.base import Engine, NativeOps, Parallel, StateBytes
from launcher.parallel.ds_keys import raw_key_problems
from launcher.paths import PathText
from launcher.precision import Fp16, Precision

Place = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True, kw_only=True)
class Zero(Parallel):
    """ZeRO (Rajbhandari et al., 2020, arXiv:1910.02054) with offload (2101.06840) and Infinity (2104.07857)."""

    kind: ClassVar[str] = "zero"
    engine: ClassVar[Engine] = "deepspeed"
    headline: ClassVar[tuple[str, ...]] = ("stage",)
    payload_options: ClassVar[tuple[str, ...]] = (
        "stage",
        "offload_optimizer",
        "offload_parameters",
        "low_memory_bf16",
    )
    resizable: ClassVar[bool] = False

    stage: Literal[0, 1, 2, 3] = 3
    """What is partitioned: 0 nothing, 1 optimiser state, 2 gradients too, 3 parameters too."""

    offload_optimizer: Place = "none"
    """Where optimiser state lives; ``cpu`` from stage 1, ``nvme`` at stage 3."""

    offload_parameters: Place = "none"
    """Where partitioned parameters live; stage 3 only."""

    nvme_path: PathText | None = None
    """Folder on a fast local disk; needed as soon as anything is offloaded to NVMe. Users and runs can share it: each
    run has a folder ``launcher-<user id>-<run id>`` in it, removed when the run ends."""

    pin_memory: bool = True
    """Page-locked host buffers: faster copies to a GPU. Without a GPU it does nothing, and the run says so; the staging
    buffers of NVMe are page-locked in any case."""

    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on."""

    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they come, against fragmentation."""

    reduce_bucket_size: int = 500_000_000
    """Elements reduced at a time."""

    allgather_bucket_size: int = 500_000_000
    """Elements gathered at a time (stages 1 and 2)."""

    prefetch_bucket_size: int = 50_000_000
    """Elements of parameters fetched ahead (stage 3)."""

    persistence_threshold: int = 100_000
    """Parameters with fewer elements are never partitioned (stage 3)."""

    max_live_parameters: int = 1_000_000_000
    """Elements of parameters resident at once before some are released (stage 3)."""

    sub_group_size: int = 1_000_000_000
    """Elements the optimiser updates at a time (stage 3): smaller needs less memory beside NVMe."""

    nvme_buffer_size: int = 100_000_000
    """Elements of one staging buffer for parameters on NVMe; at least the largest parameter."""

    nvme_buffer_count: int = 5
    """Staging buffers for parameters on NVMe."""

    max_parameters_in_ram: int = 0
    """Elements of parameters kept in host RAM although they are offloaded to NVMe; 0 keeps none."""

    low_memory_bf16: bool = False
    """Keep master weights, gradients and Adam moments in bf16 too: 10 bytes a parameter, not 16; coarser updates."""

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys, checked against DeepSpeed's own; they may not contradict a field of ours."""

    @property
    def uses_nvme(self) -> bool:
        """Whether anything lives on NVMe."""
        return "nvme" in (self.offload_optimizer, self.offload_parameters)

    def problems(self) -> Iterator[ConfigError]:
        """Refuse offload where the stage has none, empty buffers, and raw keys that would do nothing or contradict."""
        if self.stage == 0 and self.offload_optimizer == "cpu":
            yield self.refuse("offload_optimizer", "ZeRO stage 0 cannot offload", "set parallel.stage=1 or more")
        if self.stage != 3 and self.offload_optimizer == "nvme":
            why = f"only ZeRO stage 3 offloads to NVMe and parallel.stage={self.stage}"
            yield self.refuse("offload_optimizer", why, "set parallel.stage=3 or parallel.offload_optimizer=cpu")
        if self.stage != 3 and self.offload_parameters != "none":
            why = f"only ZeRO stage 3 partitions parameters and parallel.stage={self.stage}"
            yield self.refuse("offload_parameters", why, "set parallel.stage=3 or parallel.offload_parameters=none")
        if self.uses_nvme and not self.nvme_path:
            why = "something is offloaded to NVMe, and there is no folder for it"
            yield ConfigError("parallel.nvme_path", "null", why=why, fix="set parallel.nvme_path=<a folder on NVMe>")
        if self.low_memory_bf16 and self.stage == 0:
            fix = "set parallel.stage=1 or more"
            yield self.refuse("low_memory_bf16", "DeepSpeed keeps bf16 masters only from ZeRO stage 1", fix)
        yield from self.below(
            1,
            "reduce_bucket_size",
            "allgather_bucket_size",
            "prefetch_bucket_size",
            "max_live_parameters",
            "sub_group_size",
            "nvme_buffer_size",
            "nvme_buffer_count",
        )
        yield from self.below(0, "persistence_threshold", "max_parameters_in_ram")
        yield from raw_key_problems(self.deepspeed)

    def refusals(
        self, world_size: int, precision: Precision, *, optimizer: AdamW, shape: Shape | None
    ) -> Iterator[ConfigError]:
        """Refuse what the other groups rule out."""
        if self.low_memory_bf16 and precision.compute != "bf16":
            fix = "set precision=bf16 or parallel.low_memory_bf16=false"
            yield self.refuse("low_memory_bf16", f"precision is {precision.compute}", fix)
        if isinstance(precision, Fp16) and precision.min_scale != int(precision.min_scale):
            why = "DeepSpeed takes a whole number"
            yield precision.refuse("min_scale", why, f"set precision.min_scale={int(precision.min_scale)}")
        reason = "NVMe offload" if self.offload_optimizer == "nvme" else "low_memory_bf16 with offload"
        native_only = self.offload_optimizer == "nvme" or (self.low_memory_bf16 and self.offload_optimizer == "cpu")
        if native_only and optimizer.implementation == "torch":
            why = f"{reason} needs DeepSpeed's own Adam"
            yield ConfigError("optimizer.implementation", "torch", why=why, fix="set optimizer.implementation=auto")
        if self.offload_parameters == "nvme" and shape and shape.largest_param > self.nvme_buffer_size:
            why = f"the model's largest parameter has {shape.largest_param} elements"
            yield self.refuse("nvme_buffer_size", why, f"set parallel.nvme_buffer_size={shape.largest_param}")

    def notes(self, precision: Precision, *, on_gpu: bool) -> Iterator[str]:
        """Say what works, but not as one might expect."""
        if self.stage == 0 and precision.compute != "fp32":
            yield f"ZeRO stage 0 in {precision.compute} strays from the other stages by rounding; stage 1 does not"
        offloads_to_ram = "cpu" in (self.offload_optimizer, self.offload_parameters)
        if offloads_to_ram and not on_gpu:
            yield "ranks compute on the CPU, so offloading to host RAM moves nothing off a device and only adds copies"
        if (offloads_to_ram or self.uses_nvme) and self.pin_memory and not on_gpu:
            yield "parallel.pin_memory has no effect without a GPU"

    def state_bytes(self, shape: Shape, world_size: int, precision: Precision) -> StateBytes:
        """Return one rank's share, by the formulas in ``zero_memory``."""
        return zero_memory.state_bytes(
            shape.num_params,
            world_size,
            stage=self.stage,
            compute_bytes=precision.compute_bytes,
            low_memory=self.low_memory_bf16,
            optimizer_on=self.offload_optimizer,
            parameters_on=self.offload_parameters,
            parameters_in_ram=self.max_parameters_in_ram,
        )

    def formula(self, world_size: int, precision: Precision) -> str:
        """Return the arithmetic of ``state_bytes`` in words."""
        return zero_memory.formula(
            world_size,
            stage=self.stage,
            mixed=precision.compute != "fp32",
            low_memory=self.low_memory_bf16,
            offloads=self.offload_optimizer != "none",
        )

    def wants_native_adam(self, optimizer: AdamW) -> bool:
        """Whether DeepSpeed's compiled Adam is asked for; ``auto`` asks for it under offload."""
        offloads = self.offload_optimizer != "none"
        return optimizer.implementation == "native" or (optimizer.implementation == "auto" and offloads)

    def native_ops(self, optimizer: AdamW) -> NativeOps:
        """Return what has to be compiled before ranks start."""
        needed: list[str] = []
        optional: list[str] = []
        if self.wants_native_adam(optimizer):
            replaceable = optimizer.implementation == "auto" and self.offload_optimizer == "cpu"
            replaceable = replaceable and not self.low_memory_bf16
            adam = "fused_adam" if self.offload_optimizer == "none" else "cpu_adam"
            (optional if replaceable else needed).append(adam)
        if self.uses_nvme:
            needed += ["pin_memory", "async_io"]
        return NativeOps(needed=tuple(needed), optional=tuple(optional))

    def engine_config(
        self, *, batch: Batch, clip_norm: float, optimizer: AdamW, precision: Precision
    ) -> dict[str, Any]:
        """Return the configuration the run asks for; a rank may take torch's Adam where the native one is missing."""
        return self.ds_config(
            batch=batch,
            clip_norm=clip_norm,
            optimizer=optimizer,
            precision=precision,
            native_adam=self.wants_native_adam(optimizer),
        )

    def ds_config(
        self, *, batch: Batch, clip_norm: float, optimizer: AdamW, precision: Precision, native_adam: bool
    ) -> dict[str, Any]:
        """Return DeepSpeed's whole configuration; see ``launcher.parallel.ds_config``."""
        return ds_config.render(
            self, batch=batch, clip_norm=clip_norm, optimizer=optimizer, precision=precision, native_adam=native_adam
        )
