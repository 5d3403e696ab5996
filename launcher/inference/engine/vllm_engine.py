"""vLLM as an engine: its server is a child process, and each request has a thread."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import secrets
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
    InvalidRequest,
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
        authorization: header that requests must show; without it every user of this machine could use the port.
    """

    def __init__(self, run: Run, job: GeneratingJob, *, name: str) -> None:
        self._run, self._job, self._name = run, job, name
        self.port = free_port()
        self._key = secrets.token_urlsafe(32)
        self.authorization = f"Bearer {self._key}"
        self._process: subprocess.Popen[bytes] | None = None
        self._known: Process | None = None
        self._started_s = 0.0

    def command(self, model: str) -> list[str]:
        """Return the command for a folder of weights."""
        job, run = self._job, self._run
        python = str(Path(job.vllm_python or "").expanduser())
        # the module: the command `vllm` looks for a package of that name, which builds for CPUs do not have
        arguments = [python, "-m", _VLLM_MODULE, "--model", model, "--host", "127.0.0.1", "--port", str(self.port)]
        arguments += ["--served-model-name", self._name, "--max-num-seqs", str(job.max_num_seqs)]
        arguments += ["--dtype", {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[run.precision.compute]]
        arguments += ["--seed", str(job.seed)]
        if not job.enable_prefix_caching:
            arguments += ["--no-enable-prefix-caching"]
        return arguments

    def start(self, model: str) -> None:
        """Start it, or restart it after it has ended; it dies with this process.

        Args:
            model: folder of weights.
        """
        environ = {name: value for name, value in os.environ.items() if name not in (API_KEYS_VARIABLE, "PYTHONPATH")}
        environ["VLLM_API_KEY"] = self._key
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
        """Return the exit code, ``None`` while it runs."""
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
_UNSUPPORTED = ("num_beams", "no_repeat_ngram_size")
_ID_PREFIX = "token_id:"


@dataclass(slots=True)
class _ActiveRequest:
    """One request that has not ended."""

    request: EngineRequest
    arrived_s: float
    connection: http.client.HTTPConnection | None = None
    """Set once it is sent."""


@dataclass(frozen=True, slots=True)
class _Completion:
    """Response to one request."""

    active: _ActiveRequest
    status: int = 0
    body: Any = field(default_factory=dict)
    error: str = ""


class VllmEngine(InferenceEngine):
    """Sends prompts as tokens; receives a sequence's tokens all at once when it is complete.

    Args:
        server: started.
        name: what requests call the model.
        limits: ``max_num_seqs`` of its requests are sent at a time.
        max_model_len: longest sequence, prompt and output together.
        vocab_size: of the model.
        heartbeat: called while it loads.

    Raises:
        JobError: it ends before it answers.
    """

    _active: dict[str, _ActiveRequest]

    def __init__(
        self,
        server: VllmServer,
        *,
        name: str,
        limits: EngineLimits,
        max_model_len: int,
        vocab_size: int,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(limits, max_model_len=max_model_len, vocab_size=vocab_size)
        self._server, self._name = server, name
        self._answers: queue.SimpleQueue[_Completion] = queue.SimpleQueue()
        self._steps = self._prompted = self._generated = 0
        self._stepped_s = time.monotonic()
        while not self._is_healthy():
            self._check_alive()
            heartbeat()
            time.sleep(_HEALTH_CHECK_S)

    def _accept(self, request: EngineRequest) -> None:
        """Queue a request."""
        defaults = SamplingParams(max_tokens=1)
        for name in _UNSUPPORTED:
            if getattr(request.sampling, name) != getattr(defaults, name):
                raise InvalidRequest(name, "vLLM's server does not have it")
        self._active[request.id] = _ActiveRequest(request, time.monotonic())

    def step(self) -> Sequence[EngineOutput]:
        """Send the requests that fit; return those completed since the last call.

        It waits briefly for them.

        Raises:
            JobError: vLLM has ended.
        """
        outputs = [
            EngineOutput(request_id=name, finish_reason="cancelled") for name in self._cancelled if self._drop(name)
        ]
        self._cancelled.clear()
        self._send_waiting()
        if not any(active.connection for active in self._active.values()):
            return outputs
        try:
            answer = self._answers.get(timeout=_POLL_S)
            while True:
                if self._active.get(answer.active.request.id) is answer.active:
                    outputs.append(self._handle_completion(answer))
                answer = self._answers.get_nowait()
        except queue.Empty:
            self._check_alive()
        return outputs

    def stats(self) -> EngineStats:
        """Return the counts that are known outside vLLM."""
        running = sum(active.connection is not None for active in self._active.values())
        return EngineStats(
            running=running,
            waiting=len(self._active) - running,
            steps_total=self._steps,
            prompt_tokens_total=self._prompted,
            generated_tokens_total=self._generated,
            since_step_s=time.monotonic() - self._stepped_s if self._active else 0.0,
        )

    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Do nothing: vLLM has warmed up when it answers."""

    def close(self) -> None:
        """End the server."""
        for name in list(self._active):
            self._drop(name)
        self._server.end()

    def _is_healthy(self) -> bool:
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
            raise JobError(f"vLLM ended with exit code {code}; see its error above")

    def _wait_for_exit(self) -> None:
        """Wait for a server that dropped a connection to exit.

        If it does, no request is to blame.
        """
        until = time.monotonic() + _SHUTDOWN_S
        while time.monotonic() < until:
            self._check_alive()
            time.sleep(_POLL_S)

    def _drop(self, name: str) -> bool:
        """Drop a request; return whether it was there.

        Closing its connection ends it at the server.
        """
        active = self._active.pop(name, None)
        if active is not None and active.connection is not None and active.connection.sock is not None:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                active.connection.sock.shutdown(socket.SHUT_RDWR)
        return active is not None

    def _send_waiting(self) -> None:
        waiting = [active for active in self._active.values() if active.connection is None]
        free = self._limits.max_num_seqs - (len(self._active) - len(waiting))
        for active in sorted(waiting, key=self._rank)[: max(0, free)]:
            active.connection = http.client.HTTPConnection("127.0.0.1", self._server.port)
            threading.Thread(target=self._complete, args=(active, active.connection), daemon=True).start()

    def _rank(self, active: _ActiveRequest) -> float:
        return self._limits.rank(arrived_s=active.arrived_s, priority=active.request.priority)

    def _complete(self, active: _ActiveRequest, connection: http.client.HTTPConnection) -> None:
        """On a thread of its own: send one request and wait for its answer."""
        try:
            body = json.dumps(request_body(active.request, model=self._name))
            headers = {"Content-Type": "application/json", "Authorization": self._server.authorization}
            connection.request("POST", "/v1/completions", body, headers)
            answer = connection.getresponse()
            found = _Completion(active, answer.status, json.loads(answer.read()))
        except (OSError, ValueError, http.client.HTTPException) as error:
            found = _Completion(active, error=f"{type(error).__name__}: {error}")
        finally:
            connection.close()
        self._answers.put(found)

    def _handle_completion(self, answer: _Completion) -> EngineOutput:
        request = answer.active.request
        del self._active[request.id]
        self._steps += 1
        self._stepped_s = time.monotonic()
        if answer.status != http.HTTPStatus.OK:
            if answer.error:
                self._wait_for_exit()
            said = answer.body.get("error", answer.body) if isinstance(answer.body, dict) else answer.body
            why = answer.error or f"vLLM says {answer.status}: {said}"
            return EngineOutput(request_id=request.id, finish_reason="error", error=why)
        try:
            choice = answer.body["choices"][0]
            tokens, reason = parse_tokens(choice), choice["finish_reason"]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            why = f"vLLM's answer is none: {type(error).__name__}: {error}"
            return EngineOutput(request_id=request.id, finish_reason="error", error=why)
        self._prompted += len(request.prompt)
        self._generated += len(tokens)
        finish_reason: FinishReason = "stop" if reason == "stop" else "length"
        return EngineOutput(request_id=request.id, tokens=tokens, finish_reason=finish_reason)


def request_body(request: EngineRequest, *, model: str) -> dict[str, Any]:
    """Return a request as vLLM takes it."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": list(sampling.stop_token_ids),
        "logit_bias": {str(token): added for token, added in sampling.logit_bias} or None,
    }
    names = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "logprobs")
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    return body | {name: getattr(sampling, name) for name in (*names, *penalties)}


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
