"""Adapters on a rank: PEFT's layers in a model without storage, and their values."""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from launcher.checkpoint.tensors import StoredState
from launcher.config.adapter_folder import ADAPTER_ATTRIBUTE, ADAPTER_NAME, ADAPTER_WEIGHTS, base_name, peft_config
from launcher.config.model.folder import checkpoint_files
from launcher.quantization.codecs import keep_differentiable, quantized_layers
from launcher.quantization.layers import matrices

if TYPE_CHECKING:
    from typing import Any

    from transformers import PreTrainedModel

    from launcher.config.adapter import Lora
    from launcher.config.adapter_folder import AdapterFolder
    from launcher.models.deferred_init import TensorSource


class InjectedAdapter:
    """PEFT's layers in a model that has no storage yet.

    The model's own parameters are frozen and keep their names but for ``.base_layer``.

    Args:
        model: on the meta device; changed in place.
        lora: what to inject.
        seed: of the matrices; each is drawn by its name, so it is the same under every strategy.
        folder: values to load instead; ``None`` draws them.
        base: name of the model, for the config that is saved.

    Raises:
        ConfigError: a name in the options matches no module of the model.
    """

    def __init__(
        self, model: PreTrainedModel, lora: Lora, *, seed: int, folder: AdapterFolder | None = None, base: str = ""
    ) -> None:
        linear = matrices(model)
        self.names = lora.target_names(linear)
        whole = lora.saved_names(name for name, _ in model.named_modules() if name)
        self._model, self._lora, self._seed = model, lora, seed
        self._stored = AdapterTensors(folder) if folder is not None else None
        is_conv1d = isinstance(linear[self.names[0]], Conv1D)
        self.config = peft_config(lora, base=base, targets=self.names, whole=whole, linear=linear, is_conv1d=is_conv1d)
        _inject(model, self.config, self.names)
        setattr(model, ADAPTER_ATTRIBUTE, self.config)
        self._targets, self._shapes = (
            set(self.names),
            {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)},
        )

    def path(self, layer: str) -> str:
        """Return where a layer of the model is now."""
        return f"{layer}.base_layer" if layer in self._targets else layer

    def source(self, base: TensorSource | None) -> TensorSource:
        """Return where the parameters of the model with its adapter come from.

        Args:
            base: source of the model's own; ``None`` draws them.
        """

        def read(names: Sequence[str]) -> Tensor | None:
            for name in names:
                if self._stored is not None and (stored := self._stored.read(name)) is not None:
                    return stored
                if ".lora_" in name:
                    return self._drawn(name)
            return base([base_name(name) for name in names]) if base is not None else None

        return read

    def _drawn(self, name: str) -> Tensor:
        """Return the first values of a parameter of the adapter."""
        shape = self._shapes[name]
        if ".lora_A." not in name:  # B is zero; lengths are taken from the weights once they are there
            return torch.zeros(shape)
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        values = torch.empty(shape)
        if self._lora.init == "gaussian":
            return values.normal_(std=1 / self._lora.r, generator=generator)
        return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)

    def finish_part(self, part: str) -> None:
        """Complete one part of the model, which is filled and quantized."""
        from peft.tuners.lora import LoraLayer
        from peft.utils import ModulesToSaveWrapper

        within = self._model.get_submodule(part)
        with torch.no_grad():
            for path, module in within.named_modules(prefix=part):
                keep_differentiable(module)
                if isinstance(module, LoraLayer):
                    self._finish_layer(path, module)
                elif isinstance(module, ModulesToSaveWrapper):
                    self._copy_original(path, module)

    def _finish_layer(self, path: str, layer: Any) -> None:
        if not isinstance(layer.get_base_layer(), Conv1D):
            layer.fan_in_fan_out = False  # Conv1D that was quantized is a plain matrix
        if self._lora.is_dora and not self._has(f"{path}.lora_magnitude_vector.{ADAPTER_NAME}.weight"):
            weight = layer.get_base_layer().weight
            rows = weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight
            lengths = layer.lora_magnitude_vector[ADAPTER_NAME].weight
            lengths.copy_(torch.linalg.norm(rows.float(), dim=1).view(lengths.shape))

    def _copy_original(self, path: str, wrapper: Any) -> None:
        trained = wrapper.modules_to_save[ADAPTER_NAME]
        for name, parameter in wrapper.original_module.named_parameters():
            if not self._has(f"{path}.modules_to_save.{ADAPTER_NAME}.{name}"):
                trained.get_parameter(name).copy_(parameter)

    def _has(self, name: str) -> bool:
        return self._stored is not None and name in self._stored.names


def _inject(model: PreTrainedModel, config: Mapping[str, Any], names: Sequence[str]) -> None:
    with _quiet_imports():
        from peft import LoraConfig, inject_adapter_in_model

    options = {key: value for key, value in config.items() if key not in ("peft_type", "inference_mode")}
    options["target_modules"] = list(names)
    with torch.device("meta"), _quiet_imports():
        inject_adapter_in_model(LoraConfig(**options), model, ADAPTER_NAME, low_cpu_mem_usage=True)


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """Drop what the packages that PEFT imports say about kernels for other devices."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class AdapterTensors:
    """The tensors of an adapter on the disk, by the names of parameters in a model with it."""

    def __init__(self, found: AdapterFolder) -> None:
        self._found = found
        self._file = found.folder / ADAPTER_WEIGHTS
        files = checkpoint_files(found.folder) if not self._file.is_file() else []
        self._state = StoredState(files) if files else None
        self.names = frozenset(found.shapes)

    def read(self, name: str) -> Tensor | None:
        """Return the values of a parameter; ``None`` where the adapter has none."""
        key = self._found.keys.get(name)
        if key is None:
            return None
        if self._state is not None:
            return self._state.read(key)
        with safe_open(self._file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(key)
            return found


class MergedWeights:
    """Reads the weights of a model with an adapter added to them.

    Args:
        found: the adapter.
        base: reads the model's own weights.
        transposed: whether the matrix of a layer is stored as (inputs, outputs), by the layer's name.
    """

    def __init__(
        self, found: AdapterFolder, base: Callable[[Sequence[str]], Tensor | None], *, transposed: Callable[[str], bool]
    ) -> None:
        self._lora, self._base, self._transposed = found.lora, base, transposed
        self._tensors = AdapterTensors(found)
        self._layers = set(found.layers)
        self._whole = {base_name(name): name for name in found.shapes if ".lora_" not in name}

    def read(self, names: Sequence[str]) -> Tensor | None:
        """Return the tensor that has one of ``names`` in the model; ``None`` where it is not stored."""
        for name in names:
            if name in self._whole:
                return self._tensors.read(self._whole[name])
        stored = self._base(names)
        layer = names[0].removesuffix(".weight")
        if stored is None or not names[0].endswith(".weight") or layer not in self._layers:
            return stored
        return self._merged(layer, stored)

    def _merged(self, layer: str, stored: Tensor) -> Tensor:
        a, b = (self._tensors.read(f"{layer}.{part}.{ADAPTER_NAME}.weight") for part in ("lora_A", "lora_B"))
        assert a is not None, "a layer with matrices"
        assert b is not None, "a layer with matrices"
        lengths = self._tensors.read(f"{layer}.lora_magnitude_vector.{ADAPTER_NAME}.weight")
        if not self._transposed(layer):
            return merged_weight(self._lora, stored, a, b, lengths)
        return merged_weight(self._lora, stored.T, a, b, lengths).T.contiguous()


def merged_weight(lora: Lora, weight: Tensor, a: Tensor, b: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the matrix (outputs, inputs), in fp32, of a layer with its adapter added.

    Args:
        lora: the adapter.
        weight: (outputs, inputs), of the layer.
        a: (rank, inputs).
        b: (outputs, rank).
        lengths: of the outputs' weights, where DoRA trains them.
    """
    merged = weight.float() + lora.scaling * (b.float() @ a.float())
    if lengths is not None:
        merged = merged * (lengths.float().view(-1) / torch.linalg.norm(merged, dim=1))[:, None]
    return merged


class MergedModel:
    """The tensors of a built model with its adapter added to them, for an export.

    Args:
        model: on the CPU, with an adapter or without; its layers may be quantized.
        lora: the adapter; ``None`` where the model has none.
        transposed: names of quantized layers whose matrix the files have as (inputs, outputs); of a model with an
            adapter they are found.
    """

    def __init__(self, model: PreTrainedModel, lora: Lora | None, *, transposed: Collection[str] = ()) -> None:
        from peft.tuners.lora import LoraLayer

        self._lora, self._transposed = lora, transposed
        self._layers: dict[str, Any] = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
        }
        self._is_conv1d = any(layer.is_target_conv_1d_layer for layer in self._layers.values())  # then all blocks are
        quantized = {name: layer for name, layer in quantized_layers(model) if name not in self._layers}
        self._quantized = {name.removesuffix(".base_layer"): layer for name, layer in quantized.items()}
        self.num_dequantized = len(self._quantized)
        self._values = self._plain_tensors(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._values.items()}
        for name, layer in self._quantized.items():
            shapes[f"{name}.weight"] = self._stored_shape(name, layer)
        self.shapes: dict[str, tuple[int, ...]] = shapes
        self.unexpected: set[str] = set()
        self.unconverted: dict[str, str] = {}
        self.missing: set[str] = set()

    def _plain_tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return what is neither the adapter's nor a quantized matrix, by the model's names."""
        own = tuple(f"{name}{end}." for name in self._quantized for end in ("", ".base_layer"))
        found = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            is_copied = ".original_module." in name
            is_matrix = name.startswith(own) and not name.endswith(".bias")
            if ".lora_" not in name and not is_copied and not is_matrix:
                found[base_name(name)] = tensor.detach()
        return found

    def _stored_shape(self, name: str, layer: Any) -> tuple[int, ...]:
        transposed = self._is_transposed(name)
        return (layer.in_features, layer.out_features) if transposed else (layer.out_features, layer.in_features)

    def _is_transposed(self, name: str) -> bool:
        """Return whether the files of the model have this matrix as (inputs, outputs)."""
        return name in self._transposed or (self._is_conv1d and (name in self._layers or name in self._quantized))

    def mismatched(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return nothing: the tensors are those of a model that was built."""
        return {}

    def read(self, names: Sequence[str]) -> Tensor | None:
        """Return the tensor that has one of ``names`` in the model; ``None`` if there is none."""
        name = next((name for name in names if name in self.shapes), None)
        if name is None:
            return None
        owner, _, key = name.rpartition(".")
        if key != "weight" or (owner not in self._layers and owner not in self._quantized):
            return self._values[name]
        transposed = self._is_transposed(owner)
        if owner in self._quantized:
            weight = dequantized(self._quantized[owner])
        else:
            weight = self._values[name].T if transposed else self._values[name]
        if owner in self._layers:
            assert self._lora is not None, "a layer with an adapter"
            layer = self._layers[owner]
            lengths = layer.lora_magnitude_vector[ADAPTER_NAME].weight if self._lora.is_dora else None
            a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
            weight = merged_weight(self._lora, weight, a, b, lengths).detach()
        return weight.T.contiguous() if transposed else weight

    def are_equal(self, one: str, other: str) -> bool:
        """Return whether two names of the model have equal values."""
        first, second = self.read([one]), self.read([other])
        assert first is not None, "a name of the model"
        assert second is not None, "a name of the model"
        return bool(torch.equal(first, second))


def dequantized(layer: Any) -> Tensor:
    """Return the fp32 matrix (outputs, inputs) of a quantized layer, from unit vectors."""
    with torch.no_grad():
        rows: Tensor = layer(torch.eye(layer.in_features))
        weight: Tensor = rows if layer.bias is None else rows - layer(torch.zeros(1, layer.in_features))
        return weight.T.contiguous()
