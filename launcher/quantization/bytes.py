"""What a model's weights take, counted tensor by tensor: packed ones as they are packed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from launcher.quantization.targets import matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS, EMBEDDINGS, REST = "quantised layers", "embeddings and head", "everything else"
GROUPS = (LAYERS, EMBEDDINGS, REST)


def bytes_by_group(model: PreTrainedModel, layers: set[str]) -> dict[str, int]:
    """Return the bytes in memory of each group; tensors that are shared count once.

    Args:
        model: quantised or not.
        layers: names of those that are, or will be, quantised; their biases belong to the rest.
    """
    found, seen = dict.fromkeys(GROUPS, 0), set[int]()
    outer = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name, module in model.named_modules():
        for key, tensor in own_tensors(module):
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            group = LAYERS if name in layers and key != "bias" else EMBEDDINGS if id(module) in outer else REST
            found[group] += tensor.nbytes
    return found


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors that a module itself holds, those inside of quantised weights among them."""
    for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield from ((key, part) for part in _plain(tensor))


def _plain(tensor: Any) -> Iterator[Tensor]:
    state = getattr(tensor, "quant_state", None)  # bitsandbytes
    names = [*getattr(tensor, "tensor_data_names", ()), *getattr(tensor, "optional_tensor_data_names", ())]
    if names:  # torchao
        yield from (part for name in names if (part := getattr(tensor, name)) is not None)
    elif state is not None:
        yield tensor.data
        yield from (part for part in (state.absmax, state.code) if part is not None)
    else:
        yield tensor.detach()


def bf16_bytes(model: PreTrainedModel, layers: set[str]) -> int:
    """Return what the matrices of these layers take in bf16; the model is not quantised."""
    found = matrices(model)
    return sum(2 * found[name].weight.numel() for name in layers)
