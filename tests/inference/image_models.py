"""Tiny image-text models whose answers depend on their images, and what Transformers makes of a conversation alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import image_model
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from launcher.data.image_store import pack_arrays
from launcher.inference.engine.base import RequestImage
from launcher.inference.tokenizer import TextTokenizer, load_text_tokenizer
from launcher.models.processor import PER_TOKEN, ImageTextProcessor, load_processor
from tests.image_rows import encoded, picture

TEXT = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Sizes that compiled kernels take."""
NEW_TOKENS = 6


def write_model(folder: Path, kind: str) -> None:
    """Write a model with weights so large that scores, and what images change in them, are far apart."""
    image_model.write_image_model(folder, kind)
    tree = json.loads((folder / "config.json").read_text())
    tree["text_config"] |= TEXT | {"initializer_range": 0.3}
    tree["vision_config"]["initializer_range"] = 0.3
    if kind == "qwen2_vl":
        tree["vision_config"]["hidden_size"] = TEXT["hidden_size"]
        tree["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
    (folder / "config.json").write_text(json.dumps(tree))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)


class ImageModel:
    """A folder, and what is loaded from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processor: ImageTextProcessor = load_processor(folder, option="model.name")
        self.tokenizer: TextTokenizer = load_text_tokenizer(folder)
        self._stock = self.load()
        self._alone: dict[str, tuple[list[int], list[int]]] = {}

    def load(self) -> PreTrainedModel:
        """Return the model, in fp32."""
        model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32)
        return model.eval().requires_grad_(False)

    def alone(self, content: Sequence[str | int], **options: Any) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt, and what ``generate`` adds to it; an image is the number of its picture."""
        key = json.dumps([list(content), options])
        if key not in self._alone:
            self._alone[key] = self._generate(content, options)
        return self._alone[key]

    def _generate(self, content: Sequence[str | int], options: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        pictures = [picture(*image(part)) for part in content if isinstance(part, int)]
        text = self.tokenizer.render([message(content)])
        made = self.processor.inputs(text, pictures)
        arrays = {name: torch.from_numpy(array) for name, array in made.arrays.items()} if pictures else {}
        ids = torch.tensor([made.input_ids])
        how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 1, "eos_token_id": None, **options}
        found = self._stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arrays, **how)
        return made.input_ids, found[0, ids.shape[1] :].tolist()

    def prompt(self, content: Sequence[str | int], files: Path) -> tuple[tuple[int, ...], tuple[RequestImage, ...]]:
        """Return the tokens and images of a request, each image preprocessed alone, as the server does it."""
        images, texts = [], []
        for part in content:
            if isinstance(part, int):
                made = self.processor.inputs(self.processor.image_token, [picture(*image(part))])
                file = files / f"{part}"
                file.write_bytes(pack_arrays({k: v for k, v in made.arrays.items() if k not in PER_TOKEN}))
                (written,) = made.replacements
                texts.append(written.text)
                count = written.text.count(self.processor.image_token)
                images.append(RequestImage(content=f"{part:064x}", file=str(file), num_tokens=count))
        return tuple(self.tokenizer.encode_chat([message(content)], images=texts)), tuple(images)


def image(number: int) -> tuple[int, tuple[int, int]]:
    """Return the arguments of a picture: images differ in content and, by their number, in size."""
    return number, ((24, 16), (16, 40), (30, 30), (70, 20))[number % 4]


def message(content: Sequence[str | int]) -> Mapping[str, Any]:
    """Return a user's message as templates take it."""
    if all(isinstance(part, str) for part in content):
        return {"role": "user", "content": "".join(map(str, content))}
    parts = [{"type": "image"} if isinstance(part, int) else {"type": "text", "text": part} for part in content]
    return {"role": "user", "content": parts}


def data_url(number: int, form: str = "PNG") -> str:
    """Return a picture as clients send it."""
    import base64

    raw = encoded(picture(*image(number)), form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(raw).decode()}"
