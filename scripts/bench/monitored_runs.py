"""A real Prometheus with the rules that ``launch deploy`` renders, and the training run that it scrapes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from launcher.backends.kubernetes.manifest_parts import manifest_text
from launcher.deploy.folder import write
from launcher.deploy.prepare import prepare
from launcher.deploy.registry import render
from launcher.utils.system import free_port

TRAINING = (
    *("model.num_hidden_layers=1", "model.hidden_size=64", "model.num_attention_heads=2", "job.steps=1000000"),
    *("job.sequence_length=16", "job.micro_batch=2", "job.sample_tokens=0", "backend.ranks=1"),
)
"""A training run of a small model, without end."""
_START_S = 300.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"(?<=\[)(\d+)([smhd])(?=\])|(?<=offset )(\d+)([smhd])\b")


def divided(rules: str, by: int) -> str:
    """Return rules whose windows and waits are shorter; names of recorded series stay."""
    found = yaml.safe_load(rules)
    for rule in (rule for group in found["groups"] for rule in group["rules"]):
        rule["expr"] = _WINDOW.sub(lambda each: _shorter(each[1] or each[3], each[2] or each[4], by), rule["expr"])
        if "for" in rule:
            rule["for"] = _shorter(rule["for"][:-1], rule["for"][-1], by)
    return manifest_text(found)


def _shorter(number: str, unit: str, by: int) -> str:
    return f"{-(-int(number) * _UNITS[unit] // by)}s"


def monitoring_folder(folder: Path, renderings: Sequence[Sequence[str]], *, divide: int = 1) -> None:
    """Write what ``deploy=monitoring`` renders for servers and runs, for one Prometheus that scrapes them all.

    Args:
        folder: to write into.
        renderings: overrides of each server or run, ``deploy.targets`` included; at most one of each kind.
        divide: shortens all windows and waits of the rules.
    """
    files: dict[str, str | bytes] = {}
    scraped: list[Any] = []
    for words in renderings:
        files |= render(*prepare((*words, "deploy=monitoring", f"deploy.out={folder}")))
        scraped += yaml.safe_load(files["prometheus.yml"])["scrape_configs"]
    config = {**yaml.safe_load(files["prometheus.yml"]), "scrape_configs": scraped}
    files["prometheus.yml"] = manifest_text(config)
    for path in (path for path in files if path.startswith("rules/") and divide > 1):
        files[path] = divided(str(files[path]), divide)
    write(folder, files)


@contextlib.contextmanager
def running_prometheus(folder: Path) -> Iterator[str]:
    """Run Prometheus with the ``prometheus.yml`` of a folder; yield its address."""
    program = shutil.which("prometheus")
    if program is None:
        raise FileNotFoundError("prometheus is not installed: apt-get install prometheus")
    port = free_port()
    options = ("--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}")
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *options], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_until(
            lambda: _answers(f"http://127.0.0.1:{port}/-/ready"),
            process=process,
            shown=lambda: f"Prometheus does not start:\n{(folder / 'prometheus.log').read_text()}",
        )
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 (this machine)
            return True
    except OSError:
        return False


def wait_until(
    condition: Callable[[], object],
    *,
    seconds: float = _START_S,
    process: subprocess.Popen[bytes] | None = None,
    shown: Callable[[], str],
) -> None:
    """Return once ``condition`` holds.

    Raises:
        RuntimeError: it does not hold in time, or ``process`` has ended; the message is what ``shown`` returns.
    """
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until or (process is not None and process.poll() is not None):
            raise RuntimeError(shown())
        time.sleep(0.1)


def alert_states(prometheus: str) -> Mapping[str, str]:
    """Return the state, ``pending`` or ``firing``, of each alert that is active."""
    with urllib.request.urlopen(f"{prometheus}/api/v1/alerts", timeout=60) as answer:  # noqa: S310 (this machine)
        found = json.load(answer)["data"]["alerts"]
    # Of an alert about several instances the state that is further on: "firing" < "pending" in the alphabet.
    return {alert["labels"]["alertname"]: alert["state"] for alert in sorted(found, key=lambda one: one["state"])[::-1]}


class TrainingRun:
    """A training run of a small model, whose metrics are exported.

    Args:
        folder: for its run directory and its output; it is created.
        port: on which metrics are served.
        overrides: of the run.
    """

    def __init__(self, folder: Path, *, port: int, overrides: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True)
        self._url, self._output = f"http://127.0.0.1:{port}/metrics", folder / "output.txt"
        words = (*TRAINING, "tracker=prometheus", f"tracker.port={port}", f"run.dir={folder / 'run'}", *overrides)
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launcher", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def metric(self, name: str) -> float:
        """Return the value of a metric; 0 while nothing is served."""
        try:
            with urllib.request.urlopen(self._url, timeout=10) as answer:  # noqa: S310 (this machine)
                text = answer.read().decode()
        except OSError:
            return 0.0
        found = re.search(rf"^launcher:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_for(self, name: str) -> None:
        """Return once a metric is above 0."""
        wait_until(lambda: self.metric(name) > 0, process=self._process, shown=self._output.read_text)

    def rank(self) -> psutil.Process:
        """Return the process of its rank: the child of the rank's monitor."""
        ranks = [each for each in self._processes() if "RANK" in each.environ()]
        monitors = {each.pid for each in ranks}
        (found,) = (each for each in ranks if each.ppid() in monitors)
        return found

    def _processes(self) -> list[psutil.Process]:
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def end(self) -> None:
        """Kill all its processes, so that nothing exports an exit code."""
        left = self._processes() if self._process.poll() is None else []
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
