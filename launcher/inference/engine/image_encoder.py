"""Images of requests in the engine: their features, and where these stand in a step.

The text model of an image-text model is served as any other model of its family; the rest of it, the vision tower with
its projector, computes the features that replace the embeddings of image tokens.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from launcher.config.inference import IMAGE_FAMILIES, unsupported_model
from launcher.data.image_store import unpack_arrays
from launcher.models.deferred_init import causal_lm_class

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from launcher.inference.engine.base import EngineRequest, RequestImage
    from launcher.inference.engine.step_plan import StepPlan

_CACHED_BYTES = 64 << 20
"""Features of images of earlier requests that are kept."""
_TEXT_MODELS = ("language_model", "text_model")
"""Names that base models of image-text models have for their text model."""
_SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}


def text_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the text model of an image-text model as a causal language model.

    They share all modules, the output head included.

    Raises:
        ConfigError: it is of a family whose text model is none that the engine knows.
    """
    if model.config.model_type not in IMAGE_FAMILIES:
        raise unsupported_model(model.config.model_type, "computes images in a way that the engine does not know")
    inner = next(getattr(model.base_model, name) for name in _TEXT_MODELS if hasattr(model.base_model, name))
    config = inner.config
    with torch.device("meta"):  # what is made here is replaced
        if config.model_type.startswith("qwen2_vl"):  # the layers of Qwen2, with positions in three dimensions
            shell: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**_SMALL, num_key_value_heads=1))
        else:
            shell = causal_lm_class(config)(config)
            if type(shell.base_model) is not type(inner):
                raise unsupported_model(
                    model.config.model_type, f"has a text model that is no {type(shell.base_model).__name__}"
                )
    setattr(shell, shell.base_model_prefix, inner)
    shell.set_output_embeddings(model.get_output_embeddings())
    shell.config = config
    return shell.eval()


class SequenceImages:
    """The images of one request.

    Args:
        request: whose.
        places: of the image tokens in its prompt, ascending.
    """

    def __init__(self, request: EngineRequest, places: list[int]) -> None:
        self.places = places
        self.missing = list(request.images)
        """Images without features, in order."""
        self.parts: list[Tensor] = []
        self.grids: list[Tensor] = []
        self.features: Tensor | None = None
        """(image tokens, hidden size), once all are there."""
        self.positions: Tensor | None = None
        """(3, prompt), of a model whose images have positions in three dimensions."""
        self.delta = 0
        """What is added to the number of a later token for its position."""


class ImageEncoder:
    """Computes features of images, one at a time, and keeps those of recent ones.

    Args:
        model: the image-text model, in inference mode.
        cached_bytes: of features that are kept.
    """

    def __init__(self, model: PreTrainedModel, *, cached_bytes: int = _CACHED_BYTES) -> None:
        self._model, self._cached_bytes = model, cached_bytes
        self.token_id: int = model.config.image_token_id
        self._embed = model.get_input_embeddings()
        self._locate = getattr(model.base_model, "get_rope_index", None)
        self._cache: OrderedDict[str, tuple[Tensor, Tensor | None]] = OrderedDict()
        self._of: dict[int, SequenceImages] = {}
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._numbers = itertools.count(1)
        self.num_encoded = 0

    def add(self, request: EngineRequest) -> int:
        """Return a number for the images of a request, whose features are not computed yet.

        Raises:
            ValueError: its prompt has another number of image tokens.
        """
        places = [place for place, token in enumerate(request.prompt) if token == self.token_id]
        if (expected := sum(image.num_tokens for image in request.images)) != len(places):
            raise ValueError(f"has {len(places)} image tokens, and its images take {expected}")
        number = next(self._numbers)
        self._of[number], self._prompts[number] = SequenceImages(request, places), request.prompt
        return number

    def encode(self, number: int) -> bool:
        """Compute the features of the next image of a request; return whether it has all of them.

        Raises:
            Exception: the model cannot take this image.
        """
        own = self._of[number]
        image = own.missing[0]
        found, grid = self._features(image)
        if len(found) != image.num_tokens:
            raise ValueError(f"the model makes {len(found)} features of an image that has {image.num_tokens} tokens")
        own.parts.append(found)
        if grid is not None:
            own.grids.append(grid)
        del own.missing[0]
        if own.missing:
            return False
        own.features, own.parts = torch.cat(own.parts), []
        if self._locate is not None:
            ids = torch.tensor([self._prompts[number]], device=self._model.device)
            kinds = (ids == self.token_id).int()
            positions, deltas = self._locate(ids, mm_token_type_ids=kinds, image_grid_thw=torch.cat(own.grids))
            own.positions, own.delta = positions[:, 0], int(deltas[0])
        return True

    def release(self, number: int) -> None:
        """Free the features of a request."""
        del self._of[number], self._prompts[number]

    def inputs_embeds(self, plan: StepPlan, input_ids: Tensor) -> Tensor:
        """Return the embeddings of a step with the features of images in their places.

        Their shape is (1, tokens, hidden size).
        """
        embeds: Tensor = self._embed(input_ids)
        first = 0
        for part in plan.segments:
            if part.images:
                own = self._of[part.images]
                low, high = (bisect_left(own.places, part.start + count) for count in (0, len(part.tokens)))
                if low < high:
                    assert own.features is not None, "a request starts when all are there"
                    rows = [first + place - part.start for place in own.places[low:high]]
                    embeds[0, rows] = own.features[low:high].to(embeds.dtype)
            first += len(part.tokens)
        return embeds

    def position_ids(self, plan: StepPlan, position_ids: Tensor) -> Tensor:
        """Return the positions of a step, given those of text, (1, tokens).

        They are (3, 1, tokens) for a model whose images have positions in three dimensions.
        """
        if self._locate is None:
            return position_ids
        positions = position_ids[None].repeat(3, 1, 1)
        first = 0
        for part in plan.segments:
            own = self._of.get(part.images)
            if own is not None and own.positions is not None:
                known = own.positions[:, part.start : part.start + len(part.tokens)]
                positions[:, 0, first : first + known.shape[1]] = known
                positions[:, 0, first + known.shape[1] : first + len(part.tokens)] += own.delta
            first += len(part.tokens)
        return positions

    def _features(self, image: RequestImage) -> tuple[Tensor, Tensor | None]:
        """Return the features of an image, (tokens, hidden size), and its grid if it has one."""
        if image.content in self._cache:
            self._cache.move_to_end(image.content)
            return self._cache[image.content]
        inputs = self._tensors(unpack_arrays(np.memmap(Path(image.file), mode="r")))
        with torch.inference_mode():
            features = torch.cat(tuple(self._model.get_image_features(**inputs, return_dict=True).pooler_output))
        self.num_encoded += 1
        self._cache[image.content] = features, inputs.get("image_grid_thw")
        while sum(kept.nbytes for kept, _ in self._cache.values()) > self._cached_bytes:
            self._cache.popitem(last=False)
        return features, inputs.get("image_grid_thw")

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return arrays on the model's device, and those of floats in its format."""
        made = {}
        for name, array in arrays.items():
            tensor = torch.from_numpy(array.copy()).to(self._model.device)
            made[name] = tensor.to(self._model.dtype) if tensor.is_floating_point() else tensor
        return made
