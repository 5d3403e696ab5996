#!/usr/bin/env python3
"""Make a tiny image-text model: config, tokenizer, processor and, if asked for, random weights.

    scripts/lab/image_model.py idefics3 FOLDER            SmolVLM's architecture: images in tiles
    scripts/lab/image_model.py llava FOLDER               one size of images
    scripts/lab/image_model.py qwen2_vl FOLDER            a grid of patches that follows the image's size
    scripts/lab/image_model.py llava FOLDER --weights     with random weights, as save_pretrained writes them

For tests and for trying things out where no weights can be downloaded: what such a model writes makes no sense.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_WIDTH = 32
_TEXT = {
    "hidden_size": _WIDTH,
    "intermediate_size": 2 * _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def write_image_model(folder: Path, kind: str, *, weights: bool = False, seed: int = 0) -> None:
    """Write the model folder; any earlier file of the same name is replaced.

    Args:
        folder: made where it does not exist.
        kind: ``idefics3``, ``llava`` or ``qwen2_vl``.
        weights: draw some and save them too, which imports torch.
        seed: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, processor, special, template = _KINDS[kind]()
    ids = _write_tokenizer(folder, special)
    config = json.loads(json.dumps(config).replace('"VOCABULARY"', str(max(ids.values()) + 1)))
    config["text_config"] |= {"bos_token_id": None, "eos_token_id": ids[special[0]], "pad_token_id": ids[special[1]]}
    config |= {"bos_token_id": None, "eos_token_id": special[0], "pad_token_id": special[1]}
    for key, token in list(config.items()):
        if key.endswith("_token_id") and isinstance(token, str):
            config[key] = ids[token]
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if kind != "qwen2_vl":
        names = {"llava": ("LlavaProcessor", {"patch_size": 8, "vision_feature_select_strategy": "default"})}
        name, settings = names.get(kind, ("Idefics3Processor", {"image_seq_len": 4}))
        if kind == "llava":
            settings |= {"num_additional_image_tokens": 1, "image_token": "<image>"}
        text = json.dumps({"processor_class": name, **settings}, indent=2)
        (folder / "processor_config.json").write_text(text + "\n", encoding="utf-8")
    if weights:
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText

        torch.manual_seed(seed)
        AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def _write_tokenizer(folder: Path, special: list[str]) -> dict[str, int]:
    """Write a tokenizer of bytes with some special tokens; return the number of each of these."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {"eos_token": special[0], "pad_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    if special[0] == "</s>":
        ends["bos_token"] = "<s>"  # noqa: S105
    (folder / "tokenizer_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
    return {text: len(words) + number for number, text in enumerate(special)}


Parts = tuple[dict[str, Any], dict[str, Any], list[str], str]


def _idefics3() -> Parts:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<end_of_utterance>", "<pad>", "<|im_start|>", "<fake_token_around_image>", "<image>", "<global-img>"]
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": "<image>",
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "vision_config": {**_VISION, "model_type": "idefics3_vision", "image_size": 16, "patch_size": 4},
        "text_config": {**_TEXT, "model_type": "llama", "vocab_size": "VOCABULARY"},
    }
    processor = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 16},
    }
    return config, processor, special + tiles, _SMOLVLM


def _llava() -> Parts:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_id": "<image>",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {**_VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        "text_config": {**_TEXT, "model_type": "llama", "vocab_size": "VOCABULARY"},
    }
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    return config, processor, ["</s>", "<pad>", "<s>", "<image>"], _LLAVA


def _qwen2_vl() -> Parts:
    special = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 2,
            "embed_dim": _WIDTH,
            "hidden_size": _WIDTH,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "text_config": {
            **_TEXT,
            "model_type": "qwen2_vl_text",
            "vocab_size": "VOCABULARY",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
    }
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 1024},
    }
    return config, processor, special, _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")


_VISION = {"hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
_KINDS: dict[str, Callable[[], Parts]] = {"idefics3": _idefics3, "llava": _llava, "qwen2_vl": _qwen2_vl}
KINDS = tuple(_KINDS)
"""Architectures that can be written."""


def main() -> None:
    """Write the model that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", action="store_true", help="draw random weights too")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_image_model(arguments.folder, arguments.kind, weights=arguments.weights, seed=arguments.seed)


if __name__ == "__main__":
    main()
