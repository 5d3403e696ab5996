"""Servers as real processes on real ports, without torchrun around them: the job itself, as a rank does it."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from launcher.config.compose import compose
from launcher.config.snapshot import dump_run
from launcher.inference.tokenizer import byte_tokenizer
from tests.conftest import Start as StartProcess
from tests.conftest import Started, start_interpreter
from tests.helpers import wait_for
from tests.ports import free_port
from tests.processes import kill_marked, marked, marked_environment, new_mark, wait_for_marked

_RANK = Path(__file__).parent / "programs" / "serving_rank.py"
_VLLM = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
words = sys.argv
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *rest): os.write(1, f"asked {self.requestline}\\n".encode())
    def answer(self, body, kind="application/json"):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def refuses(self):
        # as vLLM does where VLLM_API_KEY is set
        shown = self.headers.get("authorization")
        if self.path.startswith("/v1") and shown != "Bearer " + os.environ["VLLM_API_KEY"]:
            self.send_error(401)
            return True
    def do_GET(self):
        if self.refuses(): return
        self.answer(json.dumps(dict(path=self.path, words=words, names=sorted(os.environ))).encode())
    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.refuses(): return
        if given.get("die"): os._exit(7)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for piece in [*[bytes(1 << 16)] * given.get("pour", 0), b"data: 1\\n\\n", b"data: 2\\n\\n",
                      b"data: [DONE]\\n\\n"]:
            time.sleep(given.get("sleep", 0))
            self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(piece), piece))
        self.wfile.write(b"0\\r\\n\\r\\n")
ThreadingHTTPServer.handle_error = lambda *rest: None
ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""
"""A program that talks like vLLM, and prints what it is asked."""
WORDS = ("job=serve", "model=gpt2_tiny", "tracker=local", "backend.ranks=1", "job.engine=echo", "job.tokenizer=bytes")
MODEL = "gpt2_tiny"
_START_S = 120


@dataclass
class Served:
    """A server that runs."""

    url: str
    folder: Path
    process: Started
    mark: str
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def complete(self, prompt: Any = "abc", **more: Any) -> httpx.Response:
        """Ask for a completion, greedily by default."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
        return self.http.post("/v1/completions", json=body)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all labels, or those given."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            found = re.match(rf"(?:launcher|vllm):{name}[ {{]", line)
            if found and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    def replicas(self) -> list[psutil.Process]:
        """Return the engines' processes, the oldest first."""
        found = [each for each in marked(self.mark) if "launcher.inference.server.replica" in each.cmdline()]
        return sorted(found, key=lambda each: each.create_time())

    def ready(self) -> bool:
        """Return what it says of itself."""
        try:
            return self.http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, number: int = signal.SIGTERM, *, timeout: float = 60) -> int:
        """Tell it to end; return its exit code once nothing of it is left."""
        self.process.send_signal(number)
        code = self.process.wait(timeout)
        assert not wait_for_marked(self.mark, seconds=10), "processes left behind"
        return code


def start(
    folder: Path,
    *words: str,
    env: dict[str, str] | None = None,
    wait: bool = True,
    port: int | None = None,
    start_process: StartProcess = start_interpreter,
) -> Served:
    """Start a server in ``folder`` and wait until it is ready."""
    folder.mkdir(parents=True, exist_ok=True)
    port, mark = port or free_port(), new_mark()
    run = compose([*WORDS, f"job.port={port}", *words]).run
    (folder / "run.yaml").write_text(dump_run(run))
    with (folder / "output.txt").open("wb") as output:
        process = start_process(
            [sys.executable, str(_RANK), str(folder)],
            cwd=Path.cwd(),
            env=marked_environment(mark, {"OMP_NUM_THREADS": "1", **(env or {})}),
            stdout=output,
            stderr=output,
        )
    served = Served(f"http://127.0.0.1:{port}", folder, process, mark)
    if wait:
        wait_for(served.ready, seconds=_START_S, process=process, shown=lambda: served.output)
    return served


Start = Callable[..., Served]


def _starter(make_folder: Callable[[], Path], start_process: StartProcess = start_interpreter) -> Iterator[Start]:
    """Yield what starts servers, each in a new folder; kill in the end what is left of them."""
    started: list[Served] = []

    def begin(*words: str, env: dict[str, str] | None = None, wait: bool = True) -> Served:
        started.append(start(make_folder(), *words, env=env, wait=wait, start_process=start_process))
        return started[-1]

    yield begin
    for served in started:
        served.http.close()
        kill_marked(served.mark)
        served.process.wait()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Start]:
    """Start servers; whatever is left of them is killed in the end."""
    yield from _starter(lambda: tmp_path / uuid.uuid4().hex[:8])


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that many tests share: it echoes, in bytes, and knows a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer(folder)
    starter = _starter(lambda: tmp_path_factory.mktemp("served"))
    begin = next(starter)
    yield begin(f"job.tokenizer={folder}", "job.max_num_seqs=64", "job.read_timeout_s=3")
    next(starter, None)


def fake_vllm(folder: Path) -> Path:
    """Write an interpreter whose vLLM is ours; return its path."""
    folder = folder / "env" / "bin"
    folder.mkdir(parents=True)
    (folder / "server.py").write_text(_VLLM)
    script = f'[ "$1" = -m ] || exit 0\nexec {shlex.join([sys.executable, str(folder / "server.py")])} "$@"\n'
    (folder / "python").write_text(f"#!/bin/sh\n{script}")
    (folder / "python").chmod(0o755)
    return folder / "python"


def chat_tokenizer(folder: Path) -> None:
    """Write the byte tokenizer as a model's folder has it, with a template."""
    words = byte_tokenizer()
    (folder / "tokenizer.json").write_text(words._inner.to_str())
    template = (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' and loop.first %}{{ raise_exception('begin with the user') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def events(response: httpx.Response) -> Iterator[Any]:
    """Yield the data of each event; the last one must be the end."""
    blocks = response.text.split("\n\n")
    assert blocks[-1] == ""
    assert blocks[-2] == "data: [DONE]"
    for block in blocks[:-2]:
        if not block.startswith(":"):
            assert block.startswith("data: ")
            yield json.loads(block.removeprefix("data: "))


def text_of(chunks: Sequence[Any], index: int = 0) -> str:
    """Return the text that the chunks of a completion add up to."""
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)
