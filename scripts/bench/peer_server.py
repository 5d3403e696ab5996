"""A small server in front of a peer that has none: ``generate`` one by one or in padded batches, and CTranslate2.

    python peer_server.py generate|static|ctranslate2 --model DIR --port N [--batch 8]

It needs nothing of this project and runs in the peers' environment. The protocol is OpenAI's completions as a stream,
each token as it is made, so that the same tool measures it; what a request may say is ``prompt`` and ``max_tokens``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

_LOOK_S = 0.5
"""How often a request that waits is asked whether its client is still there."""
_GATHER_S = 0.02
"""How long a batch that is not full waits for more requests."""


@dataclass
class Job:
    """One request, and where its tokens go."""

    prompt: str
    max_tokens: int
    loop: asyncio.AbstractEventLoop
    tokens: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)
    made: int = 0
    is_gone: bool = False
    """Whether the client has left: its queue must not burden who comes next."""

    @property
    def is_over(self) -> bool:
        """Whether no client waits for another token."""
        return self.is_gone or self.made >= self.max_tokens

    def give(self, token: int) -> bool:
        """Pass on a token; return whether no client waits for another one."""
        if self.made < self.max_tokens:
            self.made += 1
            self.loop.call_soon_threadsafe(self.tokens.put_nowait, token)
            if self.made == self.max_tokens:
                self.loop.call_soon_threadsafe(self.tokens.put_nowait, None)
        return self.is_over


class AllGone(Exception):
    """No client waits for the tokens that are being generated."""


class Peer(Protocol):
    """What is measured."""

    tokenizer: Any

    def run(self, jobs: Sequence[Job]) -> None:
        """Generate for all of ``jobs`` together, greedily."""


class Generate:
    """Transformers' ``generate`` on a batch padded at the left; it lasts until the longest is done."""

    def __init__(self, model: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(
            model, use_safetensors=True, dtype=getattr(torch, dtype)
        ).eval()

    def run(self, jobs: Sequence[Job]) -> None:
        """Generate as many tokens as the longest job wants."""
        inputs = self.tokenizer([job.prompt for job in jobs], return_tensors="pt", padding=True)
        width, most = inputs["input_ids"].shape[1], max(job.max_tokens for job in jobs)

        def note(ids: Any, scores: Any) -> Any:
            """Hand on what the step before has made."""
            if ids.shape[1] > width:
                for job, token in zip(jobs, ids[:, -1].tolist(), strict=True):
                    job.give(token)
            if all(job.is_gone for job in jobs):
                raise AllGone
            return scores

        pad = self.tokenizer.pad_token_id
        with self._torch.inference_mode():
            made = self._model.generate(
                **inputs, max_new_tokens=most, do_sample=False, logits_processor=[note], pad_token_id=pad
            )
        for job, token in zip(jobs, made[:, -1].tolist(), strict=True):
            job.give(token)


class CTranslate2:
    """CTranslate2 in int8, whatever the format of others; sequences that are done leave the batch."""

    def __init__(self, model: str, dtype: str) -> None:
        import ctranslate2
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._generator = ctranslate2.Generator(model, device="cpu", compute_type="int8", intra_threads=2)

    def run(self, jobs: Sequence[Job]) -> None:
        """Generate until each job has its tokens."""
        prompts = [self.tokenizer.convert_ids_to_tokens(self.tokenizer(job.prompt)["input_ids"]) for job in jobs]
        self._generator.generate_batch(
            prompts,
            max_length=max(job.max_tokens for job in jobs),
            include_prompt_in_result=False,
            end_token=[],
            callback=lambda step: jobs[step.batch_id].give(step.token_id),
        )


def serve_jobs(peer: Peer, jobs: queue.Queue[Job], *, batch: int) -> None:
    """Take jobs in order of arrival, ``batch`` at a time, without end."""
    while True:
        if (first := jobs.get()).is_gone:
            continue
        taken = [first]
        until = time.monotonic() + _GATHER_S
        while len(taken) < batch:
            try:
                taken.append(jobs.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
        with contextlib.suppress(AllGone):
            peer.run(taken)


async def answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Peer, jobs: queue.Queue[Job]
) -> None:
    """Answer the requests of one connection."""
    job: Job | None = None
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
            lengths = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length")]
            body = json.loads(await reader.readexactly(int(lengths[0])))
            job = Job(body["prompt"], body["max_tokens"], asyncio.get_running_loop())
            jobs.put(job)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            while (token := await _next_token(job, reader)) is not None:
                text = peer.tokenizer.decode([token]) or " "
                _send(writer, {"choices": [{"text": text, "finish_reason": None}]})
                await writer.drain()
            usage = {"prompt_tokens": len(peer.tokenizer(job.prompt)["input_ids"]), "completion_tokens": job.made}
            _send(writer, {"choices": [{"text": "", "finish_reason": "length"}], "usage": usage})
            writer.write(b"0\r\n\r\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
    finally:
        if job is not None:
            job.is_gone = True


async def _next_token(job: Job, reader: asyncio.StreamReader) -> int | None:
    """Return the next token, ``None`` after the last.

    Raises:
        ConnectionResetError: the client is gone.
    """
    while True:
        try:
            return await asyncio.wait_for(job.tokens.get(), _LOOK_S)
        except TimeoutError:
            if reader.at_eof() or reader.exception() is not None:
                raise ConnectionResetError from None


def _send(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    data = f"data: {json.dumps(event)}\n\n".encode()
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def serve(peer: Peer, *, port: int, batch: int) -> None:
    """Serve until killed."""
    jobs: queue.Queue[Job] = queue.Queue()
    threading.Thread(target=serve_jobs, args=(peer, jobs), kwargs={"batch": batch}, daemon=True).start()
    server = await asyncio.start_server(lambda reader, writer: answer(reader, writer, peer, jobs), "127.0.0.1", port)
    async with server:
        await server.serve_forever()


PEERS: dict[str, tuple[Callable[[str, str], Peer], int]] = {
    "generate": (Generate, 1),
    "static": (Generate, 8),
    "ctranslate2": (CTranslate2, 16),
}
"""How to make each, and its batch."""


def main() -> None:
    """Serve what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of Transformers' models")
    arguments = parser.parse_args()
    make, batch = PEERS[arguments.peer]
    asyncio.run(serve(make(arguments.model, arguments.dtype), port=arguments.port, batch=arguments.batch or batch))


if __name__ == "__main__":
    main()
