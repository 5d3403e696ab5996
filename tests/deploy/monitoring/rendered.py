"""What ``deploy=monitoring`` renders for a server and a training run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from launcher.config.run import Run
from launcher.deploy.prepare import prepare
from launcher.deploy.registry import RENDERERS
from launcher.deploy.registry import render as render_files

PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
DEPLOY = ("deploy=monitoring", "deploy.out=monitoring", "deploy.name=chat")
SERVER = ("job=serve", "job.max_num_seqs=8", "tracker=local", *DEPLOY)
VLLM_SERVER = (
    *SERVER,
    *("model=gpt2", "model.weights=pretrained", "job.engine=vllm", "job.vllm_python=/opt/vllm/bin/python"),
)
TRAINING_RUN = ("tracker=prometheus", *DEPLOY)


def rendered(*words: str) -> tuple[Run, dict[str, str]]:
    """Return the run, and its files without the snapshot."""
    run, plan = prepare(words)
    assert RENDERERS[run.deploy.kind] == "launcher.deploy.monitoring.render"
    files = render_files(run, plan)
    files.pop("run.yaml")
    return run, files


def written(files: Mapping[str, str], folder: Path) -> None:
    """Write the files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
