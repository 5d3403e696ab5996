"""The interface without HTTP and without engines."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

import httpx

from launcher.inference.engine.base import EngineOutput, GeneratedToken
from launcher.inference.server.app import make_app
from launcher.inference.server.engine_client import EngineClient, ServerLimits
from launcher.inference.server.replica_pool import ReplicaPool
from launcher.inference.server.request_state import RequestState
from launcher.inference.server.result_cache import ResultCache
from launcher.inference.tokenizer import byte_tokenizer

MODEL = "tiny"


class InstantPool(ReplicaPool):
    """Gives every request all its tokens at once: its prompt, again and again."""

    def __init__(self, max_model_len: int) -> None:
        super().__init__(0, self._never, stall_s=60, build_timeout_s=60)
        self.max_model_len = max_model_len

    def _never(self, number: int, pool: ReplicaPool) -> Any:
        raise AssertionError("no engine is started")

    def submit(self, state: RequestState) -> None:
        sampling, prompt = state.request.sampling, state.request.prompt
        length = min(sampling.max_tokens, (self.max_model_len or 0) - len(prompt))
        output = EngineOutput(
            request_id=state.request.id, tokens=_tokens(prompt, length, sampling.logprobs or 0), finish_reason="length"
        )
        asyncio.get_running_loop().call_soon(state.handle_output, output)


@functools.cache
def _tokens(prompt: tuple[int, ...], length: int, alternatives: int) -> tuple[GeneratedToken, ...]:
    top = tuple((number, -0.5) for number in range(alternatives))
    return tuple(GeneratedToken(id=prompt[at % len(prompt)], logprob=-0.5, top=top) for at in range(length))


def client(*, max_model_len: int = 256, max_choices: int = 64) -> httpx.AsyncClient:
    """Return a client of an interface; call it in an event loop."""
    limits = ServerLimits(
        name=MODEL, capacity=64, max_queue=256, max_choices=max_choices, queue_timeout_s=60, request_timeout_s=60
    )
    engine_client = EngineClient(limits, pool=InstantPool(max_model_len), results=ResultCache(0, ttl_s=60))
    engine_client.tokenizer = byte_tokenizer()
    return httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine_client)), base_url="http://localhost")


async def post(to: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    """Send a body, as it is where it is bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await to.post(path, content=content, headers={"content-type": "application/json"})
