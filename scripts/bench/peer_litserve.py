"""LitServe in front of Transformers' ``generate``, batching by itself: the peers' environment runs it.

python peer_litserve.py --model DIR --port N [--batch 8]
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

import litserve


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Completions as a stream of OpenAI's events, a batch of requests at a time."""

    def __init__(self, model: str, *, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=0.05, stream=True, api_path="/v1/completions")
        self._folder = model

    def setup(self, device: str) -> None:
        """Load the model in the worker."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(
            self._folder, use_safetensors=True, dtype=torch.bfloat16
        ).eval()

    def decode_request(self, request) -> tuple[str, int]:  # type: ignore[no-untyped-def]  # LitServe reads the type
        """Return prompt and ``max_tokens``."""
        return request["prompt"], request["max_tokens"]

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Leave a batch as it is."""
        return inputs

    def unbatch(self, output: Iterator[list[str]]) -> Iterator[list[str]]:
        """Leave it as it is: every step has one piece a request."""
        yield from output

    def predict(self, inputs: list[tuple[str, int]]) -> Iterator[list[str]]:
        """Yield the piece of each request, step by step, until the longest is done; the others get empty ones."""
        steps: queue.Queue[list[int] | None] = queue.Queue()
        encoded = self._tokenizer([prompt for prompt, _ in inputs], return_tensors="pt", padding=True)
        most = max(count for _, count in inputs)
        thread = threading.Thread(target=self._generate, args=(encoded, most, steps), daemon=True)
        thread.start()
        number = 0
        while (tokens := steps.get()) is not None:
            number += 1
            yield [
                self._event(token, number, count) if number <= count else ""
                for token, (_, count) in zip(tokens, inputs, strict=True)
            ]

    def encode_response(self, output: Iterator[Any]) -> Iterator[Any]:
        """Leave events as they are."""
        yield from output

    def _event(self, token: int, number: int, count: int) -> str:
        choice = {
            "text": self._tokenizer.decode([token]) or " ",
            "finish_reason": "length" if number == count else None,
        }
        return f"data: {json.dumps({'choices': [choice]})}\n\n"

    def _generate(self, encoded: Any, most: int, steps: queue.Queue[list[int] | None]) -> None:
        width = encoded["input_ids"].shape[1]

        def note(ids: Any, scores: Any) -> Any:
            if ids.shape[1] > width:
                steps.put(ids[:, -1].tolist())
            return scores

        with self._torch.inference_mode():
            made = self._model.generate(
                **encoded,
                max_new_tokens=most,
                do_sample=False,
                logits_processor=[note],
                pad_token_id=self._tokenizer.pad_token_id,
            )
        steps.put(made[:, -1].tolist())
        steps.put(None)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    server = litserve.LitServer(Api(arguments.model, batch=arguments.batch), accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=arguments.port, generate_client_file=False, num_api_servers=1)


if __name__ == "__main__":
    main()
