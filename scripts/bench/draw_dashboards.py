"""Serve and train for a while under a real Prometheus, and draw both dashboards. These are not Grafana's pictures.

    python scripts/bench/draw_dashboards.py docs/images

Half of the prompts begin alike and some requests come twice, so that both caches are used; in the middle more requests
come than the server works on at a time, and then an engine is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import draw_panels
from harness import print_machine
from monitored_runs import TrainingRun, monitoring_folder, running_prometheus
from soak_server import SoakServer

from launcher.utils.system import free_port

SERVER = (
    *("model=gpt2_tiny", "job.engine=paged", "job.tokenizer=bytes", "precision=fp32", "job.warm_up=[[1,4]]"),
    *("job.kv_cache_tokens=2048", "job.max_num_seqs=4", "job.result_cache_bytes=1000000"),
)
RUN = (
    *("run.name=tiny", "job.steps=20000", "job.eval_every=300", "job.eval_sequences=64"),
    *("job.sequence_length=64", "job.micro_batch=8", "checkpoint.every=500", "job.peak_tflops=0.1"),
)
CLIENTS, CROWD = 2, 12
"""Clients that send one request after the other; and those that come in the middle."""


class Client(threading.Thread):
    """Sends one request after the other, until it is stopped.

    Args:
        url: of the server.
        seed: of the prompts.
    """

    def __init__(self, url: str, *, seed: int) -> None:
        super().__init__(daemon=True)
        self._url, self._random, self._stops = url, random.Random(seed), threading.Event()
        self.start()

    def run(self) -> None:
        """Send requests; most differ."""
        while not self._stops.wait(0.2):
            number = self._random.randrange(200)
            start = "Once upon a time there was a princess. " if number % 2 else ""
            body = {"model": "gpt2_tiny", "prompt": f"{start}{number} " * 2, "max_tokens": 8 + number % 50}
            request = urllib.request.Request(  # noqa: S310 (this machine)
                f"{self._url}/v1/completions",
                json.dumps({**body, "temperature": 0}).encode(),
                {"Content-Type": "application/json"},
            )
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                answer.read()

    def leave(self) -> None:
        """Send no more requests after this one."""
        self._stops.set()


def draw(folder: Path, out: Path, *, seconds: float) -> None:
    """Write ``serving.svg`` and ``training.svg``.

    Args:
        folder: for everything that is started.
        out: folder of the pictures.
        seconds: length of the graphs.
    """
    port, training_port = free_port(), free_port()
    every = "deploy.scrape_every_s=1"
    serving = ("job=serve", *SERVER, "tracker=local", "deploy.name=chat", f"deploy.targets=[127.0.0.1:{port}]", every)
    training = ("tracker=prometheus", f"tracker.port={training_port}", "deploy.name=training", every)
    monitoring_folder(folder / "monitoring", (serving, training))
    with contextlib.ExitStack() as stack:
        server = SoakServer(SERVER, replicas=1, folder=folder, port=port)
        stack.callback(server.kill)
        server.wait_until_ready()
        words = (
            "run.name=tiny",
            "job.steps=20000",
            "job.eval_every=300",
            "job.eval_sequences=64",
            "checkpoint.every=500",
        )
        trained = TrainingRun(folder / "training", port=training_port, overrides=(*words, "job.peak_tflops=0.1"))
        stack.callback(trained.end)
        prometheus = stack.enter_context(running_prometheus(folder / "monitoring"))
        trained.wait_for("train_step")
        begin = time.time()
        clients = [Client(server.url, seed=seed) for seed in range(CLIENTS)]
        time.sleep(seconds * 0.4)
        crowd = [Client(server.url, seed=CLIENTS + seed) for seed in range(CROWD)]
        time.sleep(seconds * 0.2)
        for client in crowd:
            client.leave()
        time.sleep(seconds * 0.1)
        server.engines()[0].kill()
        time.sleep(max(0.0, begin + seconds - time.time()))
        out.mkdir(parents=True, exist_ok=True)
        for name in ("serving", "training"):
            board = json.loads((folder / f"monitoring/grafana/dashboards/{name}.json").read_text(encoding="utf-8"))
            text = draw_panels.drawn(prometheus, board, begin=begin, end=begin + seconds)
            (out / f"{name}.svg").write_text(text, encoding="utf-8")
        for client in (*clients, *crowd):
            client.leave()


def main() -> None:
    """Draw both dashboards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--seconds", type=float, default=90, help="length of the graphs (default: 90)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that everything ends too
    print_machine("uvicorn", "torch")
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), arguments.out, seconds=arguments.seconds)


if __name__ == "__main__":
    main()
