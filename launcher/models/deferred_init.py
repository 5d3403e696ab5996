"""Build a model part by part, so that no rank holds all of it."""

from __future__ import annotations

import copy
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from launcher.config.model.image_text import is_image_text
from launcher.models.layers import inner_models, units
from launcher.models.plugin_transforms import own_tensors
from launcher.utils.heap import trim_heap

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def init_unit_weights(
    model: PreTrainedModel, name: str, unit: nn.Module, *, seed: int, added: frozenset[int] = frozenset()
) -> None:
    """Draw the weights of one part, on the CPU, as the model's own class would.

    What is drawn depends on the seed and the name of the part alone, so a rank that builds only some of them gets the
    weights that a rank which builds all of them has there. torch's global generator is left as it was.

    Args:
        model: the whole model.
        name: of the part.
        unit: the part.
        seed: of the run.
        added: ids of the modules that draw by their own ``reset_parameters``.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int.from_bytes(digest, "little"))
        _draw(unit, _owner_of(model, name), added)


def _owner_of(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return the innermost model around a part.

    Transformers asks that one, whose class may draw in its own way.
    """
    from transformers import PreTrainedModel

    owner, module = model, model
    for key in name.split(".") if name else ():
        module = getattr(module, key)
        owner = module if isinstance(module, PreTrainedModel) else owner
    return owner


def _draw(module: nn.Module, owner: PreTrainedModel, added: frozenset[int]) -> None:
    from transformers import PreTrainedModel

    for child in module.children():
        _draw(child, child if isinstance(child, PreTrainedModel) else owner, added)
    if id(module) in added:
        _reset(module)
    else:
        owner._init_weights(module)  # noqa: SLF001  (Transformers' own hook, which every model class overrides)


def _reset(module: nn.Module) -> None:
    """Let a module set its own values, but for parameters that were loaded."""
    if not any(True for _ in own_tensors(module)):
        return
    own = list(module.parameters(recurse=False))
    loaded = [(parameter, parameter.detach().clone()) for parameter in own if is_initialized(parameter)]
    module.reset_parameters()
    for parameter, value in loaded:
        parameter.copy_(value)


def meta_model(config: PreTrainedConfig, *, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model on the meta device, without storage; tied tensors are the same object.

    Formats are those of ``from_pretrained(dtype=...)``: what a family computes in fp32 (rotary wavelengths, some
    routers) stays in fp32.
    """
    from transformers.initialization import no_init_weights

    own = copy.deepcopy(config)
    own._attn_implementation = attention  # noqa: SLF001  (what from_config sets, which would partition under ZeRO-3)
    for each in (own, *(getattr(own, key, None) for key in own.sub_configs)):
        if each is not None:
            each.dtype = dtype  # parts that are models themselves, as image encoders, are built in their own
    with torch.device("meta"), _default_dtype(dtype), no_init_weights():  # there is nothing to draw into
        built = causal_lm_class(own)(own)
    _discard_values(built)
    kept = built._get_dtype_plan(dtype)  # noqa: SLF001  (from_pretrained's own list)
    if kept:
        pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in kept))
        for name, tensor in (*built.named_parameters(), *built.named_buffers()):
            if pattern.search(name):
                tensor.data = tensor.data.to(torch.float32)
    built.tie_weights()
    return built


def _discard_values(model: nn.Module) -> None:
    """Move to the meta device parameters that a class created off it.

    torch.normal and FloatTensor create them on the CPU.
    """
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                setattr(module, key, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that Transformers builds to write text, also about images.

    Raises:
        KeyError: it has none.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    tables = [MODEL_FOR_CAUSAL_LM_MAPPING]
    if is_image_text(config.to_dict()):
        tables.insert(0, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    found = next((table[type(config)] for table in tables if type(config) in table), None)
    if found is None:
        raise KeyError(type(config).__name__)
    classes: tuple[type[PreTrainedModel], ...] = found if isinstance(found, tuple) else (found,)
    names = config.architectures or ()
    return next((each for each in classes if each.__name__ in names), classes[0])


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


TensorSource = Callable[[Sequence[str]], torch.Tensor | None]
"""Returns the tensor that has one of these names in the model, or ``None``.
A tied parameter has several names."""
PartCallback = Callable[[str, nn.Module], None]
"""Called with a part's name and module once it is filled, to shard it for instance."""


def leave_part(name: str, part: nn.Module) -> None:
    """Leave a part as it is."""


class ModelBuilder:
    """Gives the parts of a skeleton their storage and their values.

    Args:
        model: with every parameter on the meta device; parts that this rank has no use for may have been taken out.
        seed: of random weights.
        source: where to take parameters and persistent buffers from instead; known to fit the model.
        then: called with the name of each part that is filled.
        added: modules that a transform of a plugin added.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        seed: int,
        source: TensorSource | None,
        then: Callable[[str], None] = lambda name: None,
        added: Sequence[nn.Module] = (),
    ) -> None:
        self._model, self._seed, self._source, self._then = model, seed, source, then
        self._added = frozenset(map(id, added))
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            assert parameter.is_meta, f"{name} has values already, and would be neither loaded nor drawn"
            self._names[id(parameter)].append(name)
        self._paths = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}
        self._tied: dict[int, nn.Parameter] = {}
        self._owner = _first_parts(model)

    def build_all(self, after: PartCallback = leave_part) -> None:
        """Fill every part, calling ``after`` with each as it is ready, then the remaining tensors."""
        for name, part in list(units(self._model)):
            self.build(name, part)
            after(name, part)
            trim_heap()  # what a part leaves behind once it is sharded would be held beside the next one
        self.finish()

    def build(self, name: str, part: nn.Module) -> None:
        """Fill one part on the CPU; a parameter tied to an earlier part stays the same object."""
        fresh: list[tuple[list[str], nn.Parameter]] = []
        for module in part.modules():
            fresh += self._materialise(module)
        self._fill(name, part, fresh)
        for module in part.modules():
            self._load_buffers(module)
        self._then(name)

    def finish(self) -> None:
        """Fill what belongs to no part: parameters and buffers of the outermost modules themselves."""
        for name, module in (("", self._model), *inner_models(self._model)):
            fresh = self._materialise(module)
            if fresh or any(True for _ in module.buffers(recurse=False)):
                shell = copy.copy(module)
                shell._modules = {}  # noqa: SLF001  (its parts are filled already)
                self._fill(name, shell, fresh)
                self._load_buffers(module)
        everything = (*self._model.named_parameters(), *self._model.named_buffers())
        empty = [name for name, tensor in everything if tensor.is_meta]
        assert not empty, f"parts left unfilled: {empty}"

    def _materialise(self, module: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
        """Allocate a module's own tensors; return the parameters new in this part, by name."""
        fresh = []
        for key, old in module._parameters.items():  # noqa: SLF001  (no public way to replace one by its key)
            if old is None or not old.is_meta:
                continue
            made = self._tied.get(id(old))
            if made is None:
                made = nn.Parameter(torch.empty_like(old, device="cpu"), requires_grad=old.requires_grad)
                fresh.append((self._names[id(old)], made))
                if len(self._names[id(old)]) > 1:
                    self._tied[id(old)] = made
            module._parameters[key] = made  # noqa: SLF001
        for key, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device="cpu")  # noqa: SLF001
        return fresh

    def _fill(self, name: str, part: nn.Module, fresh: Sequence[tuple[list[str], nn.Parameter]]) -> None:
        """Draw or load ``fresh``.

        Transformers leaves alone what is marked, and recreates buffers in any case.
        """
        for names, parameter in fresh:
            stored = self._source(names) if self._source is not None else None
            if stored is not None:
                with torch.no_grad():
                    parameter.copy_(stored)
                _mark_initialized(parameter)
            elif names[0] in self._owner and self._owner[names[0]][0] != name:
                self._draw_as_owner(names[0], parameter)
                _mark_initialized(parameter)
        init_unit_weights(self._model, name, part, seed=self._seed, added=self._added)
        for _, parameter in fresh:
            _mark_initialized(parameter)

    def _load_buffers(self, module: nn.Module) -> None:
        """Load the persistent buffers of one module, which initialisation has filled by now."""
        if self._source is None:
            return
        for key, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is None or key in module._non_persistent_buffers_set:  # noqa: SLF001
                continue
            stored = self._source([f"{self._paths[id(module)]}{key}"])
            if stored is not None:
                buffer.copy_(stored)

    def _draw_as_owner(self, owned: str, parameter: nn.Parameter) -> None:
        """Draw a tied parameter whose first part is not on this rank, as that part would have."""
        name, part = self._owner[owned]
        spare = copy.deepcopy(part).to_empty(device="cpu")
        init_unit_weights(self._model, name, spare, seed=self._seed)
        with torch.no_grad():
            parameter.copy_(spare.get_parameter(owned.removeprefix(f"{name}.")))


def _mark_initialized(parameter: nn.Parameter) -> None:
    parameter._is_hf_initialized = True  # noqa: SLF001  (Transformers' own mark)


def is_initialized(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has its values."""
    return getattr(parameter, "_is_hf_initialized", False)


def _first_parts(model: PreTrainedModel) -> dict[str, tuple[str, nn.Module]]:
    """Return the part that a tied parameter is drawn with, by the first name of the parameter."""
    found: dict[int, tuple[str, str, nn.Module]] = {}
    tied: dict[str, tuple[str, nn.Module]] = {}
    for name, part in units(model):
        for key, parameter in part.named_parameters():
            if id(parameter) in found:
                full, *owner = found[id(parameter)]
                tied[full] = (owner[0], owner[1])
            else:
                found[id(parameter)] = (f"{name}.{key}", name, part)
    return tied
