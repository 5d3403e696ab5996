"""Whether the interpreter that ``job.vllm_python`` names has vLLM."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.jobs.generating import GeneratingJob

_ASK_S = 30.0
VLLM_REMEDY = "python -m venv ENV && ENV/bin/pip install vllm, then set job.vllm_python=ENV/bin/python"


def vllm_problems(job: GeneratingJob) -> Iterator[ConfigError]:
    """Yield an interpreter that is none, or whose environment has no vLLM."""
    if job.engine != "vllm" or job.vllm_python is None:
        return
    python = Path(job.vllm_python).expanduser()
    if not os.access(python, os.X_OK) or python.is_dir():
        yield job.refuse("vllm_python", "is no program", VLLM_REMEDY)
        return
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        answer = subprocess.run([python, "-c", question], capture_output=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield job.refuse("vllm_python", f"does not run: {error}", VLLM_REMEDY)
        return
    if answer.returncode:
        yield job.refuse("vllm_python", "its environment has no vLLM", VLLM_REMEDY)
