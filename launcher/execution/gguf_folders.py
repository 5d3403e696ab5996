"""GGUF files that options name, as model folders that every job loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import xxhash

from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.utils.build_cache import build_once, default_cache_folder
from launcher.utils.system import child_environment

_CHUNK = 1 << 20


def names_gguf(weights: str) -> bool:
    """Return whether ``model.weights`` names a GGUF file."""
    return weights.endswith(".gguf") and not Path(weights).expanduser().is_dir()


def gguf_folder(run: Run) -> Path:
    """Return the model folder of the file in ``model.weights``, converted once per content.

    It is in the cache: fp32 safetensors, config and tokenizer.

    Raises:
        ConfigError: the file is missing, damaged, or of a model that is not converted; or other hosts need it.
    """
    option, value = "model.weights", run.model.weights
    file = Path(value).expanduser()
    if not run.backend.shares_paths:
        why = "is a GGUF file, which is converted on this machine, and the ranks do not see its folders"
        fix = "set it to a model folder that they see"
        raise ConfigError(option, value, why=why, fix=fix)
    try:
        digest = _digest(file)
    except OSError as error:
        raise ConfigError(option, value, why=f"cannot be read: {error.strerror}", fix="name a GGUF file") from error

    def convert(folder: Path) -> None:
        print(f"{file}: converting to a model folder in the cache", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "launcher.jobs.import_gguf", str(file), str(folder)]
        ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=child_environment())
        if ended.returncode != 0:
            said = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
            fix = "name a GGUF file of Llama or GPT-2, or a model folder"
            raise ConfigError(option, value, why=f"cannot be converted: {said[-1]}", fix=fix)

    return build_once(default_cache_folder("gguf", digest), convert, heartbeat=lambda: None)


def _digest(file: Path) -> str:
    found = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
