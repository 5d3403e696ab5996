"""vLLM as an engine: its server is a child process, and each request has a thread."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from launcher.config.inference import API_KEYS_VARIABLE
from launcher.config.sampling import SamplingParams
from launcher.errors import JobError
from launcher.inference.engine.base import (
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    GeneratedToken,
    InferenceEngine,
    Refused,
    check_request,
)
from launcher.utils.processes import Process, identify
from launcher.utils.system import free_port

if TYPE_CHECKING:
    from launcher.config.inference import EngineLimits
    from launcher.config.job.generating import GeneratingJob
    from launcher.config.run import Run


_VLLM_MODULE = "vllm.entrypoints.openai.api_server"
_TERMINATE_S = 3.0


class VllmServer:
    """One server on a loopback port.

    Args:
        run: whose model is served.
        job: how.
        name: what requests call the model.

    Attributes:
        port: where it listens.
    """

    def __init__(self, run: Run, job: GeneratingJob, *, name: str) -> None:
        self._run, self._job, self._name = run, job, name
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: Process | None = None
        self._started_s = 0.0

    def command(self, model: str) -> list[str]:
        """Return what is started, for a folder of weights."""
        job, run = self._job, self._run
        python = str(Path(job.vllm_python or "").expanduser())
        # the module: the command `vllm` looks for a package of that name, which builds for CPUs do not have
        words = [python, "-m", _VLLM_MODULE, "--model", model, "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--served-model-name", self._name, "--max-num-seqs", str(job.max_num_seqs)]
        words += ["--dtype", {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[run.precision.compute]]
        words += ["--seed", str(job.seed)]
        if not job.enable_prefix_caching:
            words += ["--no-enable-prefix-caching"]
        return words

    def start(self, model: str) -> None:
        """Start it, or start it anew after it has ended; it dies with this process.

        Args:
            model: folder of weights.
        """
        environ = {name: value for name, value in os.environ.items() if name not in (API_KEYS_VARIABLE, "PYTHONPATH")}
        # its build for CPUs, which alone reads this, would take nine tenths of all memory for keys and values
        environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, psutil.virtual_memory().available // 2**32)))
        bound = [sys.executable, "-m", "launcher.inference.engine.vllm_exec", str(os.getpid())]
        # the wrapper is ours and needs our path; what it becomes has an environment of its own
        ours = {**environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        self._process = subprocess.Popen([*bound, *self.command(model)], env=ours, stdin=subprocess.DEVNULL)
        self._known, self._started_s = identify(self._process.pid), time.monotonic()

    @property
    def is_started(self) -> bool:
        """Whether ``start`` has been called."""
        return self._process is not None

    def exit_code(self) -> int | None:
        """Return how it ended, ``None`` while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def age_s(self) -> float:
        """How long ago it was started."""
        return time.monotonic() - self._started_s

    def end(self) -> None:
        """End it, and wait until it is gone."""
        if self._process is None or self._known is None:
            return
        self._known.send(signal.SIGTERM)
        try:
            self._process.wait(_TERMINATE_S)
        except subprocess.TimeoutExpired:
            self._known.send(signal.SIGKILL)
            self._process.wait()


_POLL_S = 0.05
_HEALTH_CHECK_S = 0.5
_SHUTDOWN_S = 2.0
_UNLIMITED_BLOCKS = 1 << 40
_UNSUPPORTED = ("num_beams", "no_repeat_ngram_size")
_ID_PREFIX = "token_id:"


@dataclass(slots=True)
class _ActiveRequest:
    """One request that has not ended."""

    request: EngineRequest
    arrived_s: float
    connection: http.client.HTTPConnection | None = None
    """Set once it is under way."""


@dataclass(frozen=True, slots=True)
class _Completion:
    """What came back."""

    task: _ActiveRequest
    status: int = 0
    body: Any = field(default_factory=dict)
    trouble: str = ""


class VllmEngine(InferenceEngine):
    """Sends prompts as tokens and takes tokens back, those of a sequence all at once when it is done.

    Args:
        server: started.
        name: what requests call the model.
        limits: so many requests are under way at a time.
        context: most tokens of a sequence.
        vocab_size: of the model.
        heartbeat: called while it loads.

    Raises:
        JobError: it ends before it answers.
    """

    def __init__(
        self,
        server: VllmServer,
        *,
        name: str,
        limits: EngineLimits,
        context: int,
        vocab_size: int,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self._server, self._name, self._limits = server, name, limits
        self._context, self._vocab_size = context, vocab_size
        self._tasks: dict[str, _ActiveRequest] = {}
        self._over: list[str] = []
        self._answers: queue.SimpleQueue[_Completion] = queue.SimpleQueue()
        self._steps = self._prompted = self._generated = 0
        self._stepped_s = time.monotonic()
        while not self._answers_now():
            self._check_alive()
            heartbeat()
            time.sleep(_HEALTH_CHECK_S)

    @property
    def context(self) -> int:
        """Most tokens of a sequence."""
        return self._context

    def add(self, request: EngineRequest) -> None:
        """Queue a request, or refuse it."""
        check_request(
            request,
            known=self._tasks,
            context=self._context,
            vocab_size=self._vocab_size,
            num_pages=_UNLIMITED_BLOCKS,
            max_num_seqs=self._limits.max_num_seqs,
        )
        usual = SamplingParams(max_tokens=1)
        for name in _UNSUPPORTED:
            if getattr(request.sampling, name) != getattr(usual, name):
                raise Refused(name, "vLLM's server does not have it")
        self._tasks[request.id] = _ActiveRequest(request, time.monotonic())

    def cancel(self, request_id: str) -> None:
        """End a request before the next step."""
        if request_id in self._tasks:
            self._over.append(request_id)

    def step(self) -> Sequence[EngineOutput]:
        """Send what there is room for; return what has come since the last call, waiting a little for it.

        Raises:
            JobError: vLLM has ended.
        """
        updates = [EngineOutput(request=name, finish="cancelled") for name in self._over if self._drop(name)]
        self._over.clear()
        self._begin()
        if not any(task.connection for task in self._tasks.values()):
            return updates
        try:
            answer = self._answers.get(timeout=_POLL_S)
            while True:
                if self._tasks.get(answer.task.request.id) is answer.task:
                    updates.append(self._took(answer))
                answer = self._answers.get_nowait()
        except queue.Empty:
            self._check_alive()
        return updates

    def stats(self) -> EngineStats:
        """Return where it stands, as far as can be seen from here."""
        running = sum(task.connection is not None for task in self._tasks.values())
        return EngineStats(
            running=running,
            waiting=len(self._tasks) - running,
            steps_total=self._steps,
            prompt_tokens_total=self._prompted,
            generated_tokens_total=self._generated,
            since_step_s=time.monotonic() - self._stepped_s if self._tasks else 0.0,
        )

    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Do nothing: vLLM has warmed up when it answers."""

    def close(self) -> None:
        """End the server."""
        for name in list(self._tasks):
            self._drop(name)
        self._server.end()

    def _answers_now(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _check_alive(self) -> None:
        code = self._server.exit_code()
        if code is not None:
            raise JobError(f"vLLM ended with exit code {code}; its words are above")

    def _look_for_its_end(self) -> None:
        """Give a server that has dropped a connection the time to be seen ending: then no request is to blame."""
        until = time.monotonic() + _SHUTDOWN_S
        while time.monotonic() < until:
            self._check_alive()
            time.sleep(_POLL_S)

    def _drop(self, name: str) -> bool:
        """Forget a request; closing its connection ends it at the server. Return whether it was there."""
        task = self._tasks.pop(name, None)
        if task is not None and task.connection is not None and task.connection.sock is not None:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                task.connection.sock.shutdown(socket.SHUT_RDWR)
        return task is not None

    def _begin(self) -> None:
        waiting = [task for task in self._tasks.values() if task.connection is None]
        room = self._limits.max_num_seqs - (len(self._tasks) - len(waiting))
        for task in sorted(waiting, key=self._rank)[: max(0, room)]:
            task.connection = http.client.HTTPConnection("127.0.0.1", self._server.port)
            threading.Thread(target=self._ask, args=(task, task.connection), daemon=True).start()

    def _rank(self, task: _ActiveRequest) -> float:
        return self._limits.rank(arrived_s=task.arrived_s, priority=task.request.priority)

    def _ask(self, task: _ActiveRequest, connection: http.client.HTTPConnection) -> None:
        """On a thread of its own: send one request and wait for its answer."""
        try:
            body = json.dumps(request_body(task.request, model=self._name))
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            found = _Completion(task, answer.status, json.loads(answer.read()))
        except (OSError, ValueError, http.client.HTTPException) as error:
            found = _Completion(task, trouble=f"{type(error).__name__}: {error}")
        finally:
            connection.close()
        self._answers.put(found)

    def _took(self, answer: _Completion) -> EngineOutput:
        request = answer.task.request
        del self._tasks[request.id]
        self._steps += 1
        self._stepped_s = time.monotonic()
        if answer.status != http.HTTPStatus.OK:
            if answer.trouble:
                self._look_for_its_end()
            said = answer.body.get("error", answer.body) if isinstance(answer.body, dict) else answer.body
            why = answer.trouble or f"vLLM says {answer.status}: {said}"
            return EngineOutput(request=request.id, finish="error", problem=why)
        try:
            choice = answer.body["choices"][0]
            tokens, reason = parse_tokens(choice), choice["finish_reason"]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            why = f"vLLM's answer is none: {type(error).__name__}: {error}"
            return EngineOutput(request=request.id, finish="error", problem=why)
        self._prompted += len(request.prompt)
        self._generated += len(tokens)
        finish: FinishReason = "stop" if reason == "stop" else "length"
        return EngineOutput(request=request.id, tokens=tokens, finish=finish)


def request_body(request: EngineRequest, *, model: str) -> dict[str, Any]:
    """Return a request as vLLM takes it."""
    way = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "ignore_eos": way.ignore_eos,
        "stop_token_ids": list(way.stop_token_ids),
        "logit_bias": {str(token): added for token, added in way.logit_bias} or None,
    }
    names = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "logprobs")
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    return body | {name: getattr(way, name) for name in (*names, *penalties)}


def parse_tokens(choice: dict[str, Any]) -> tuple[GeneratedToken, ...]:
    """Return the tokens of one of vLLM's choices, with log-probabilities where there are any."""
    ids = choice["token_ids"]
    if choice.get("logprobs") is None:
        return tuple(GeneratedToken(id=number) for number in ids)
    chosen, most = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
    tokens = []
    for number, logprob, top in zip(ids, chosen, most, strict=True):
        ordered = sorted((top or {}).items(), key=lambda pair: -pair[1])
        tops = tuple((int(name.removeprefix(_ID_PREFIX)), value) for name, value in ordered)
        tokens.append(GeneratedToken(id=number, logprob=logprob, top=tops))
    return tuple(tokens)
