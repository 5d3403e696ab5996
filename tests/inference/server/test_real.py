"""A real model behind the address: what comes out is what Transformers' ``generate`` gives for it alone."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Start as StartProcess
from tests.inference.server.conftest import MODEL, Start, _starter, events, text_of

SIZES = (
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.vocab_size=257",
    "model.max_position_embeddings=128",
)


@pytest.fixture
def serve(tmp_path: Path, preloading: StartProcess) -> Iterator[Start]:
    """Start servers whose engines are forked from what has imported torch."""
    yield from _starter(lambda: tmp_path / uuid.uuid4().hex[:8], preloading)


@pytest.fixture(scope="module")
def alone() -> object:
    """Return greedy continuations, one at a time, of the same random weights."""
    import torch

    from launcher.config.compose import compose
    from launcher.inference.engine.model_loader import load_model
    from launcher.inference.tokenizer import byte_tokenizer

    run = compose(["job=serve", "model=gpt2_tiny", *SIZES, "backend.ranks=1", "tracker=local"]).run
    model, words = load_model(run, device=torch.device("cpu")), byte_tokenizer()

    def continue_(prompt: str, length: int) -> str:
        ids = torch.tensor([words.encode(prompt)])
        full = model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=None)
        return words.decode(full[0, ids.shape[1] :].tolist())

    return continue_


def test_answers_in_company_are_those_alone(serve: Start, alone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    served = serve("job.engine=paged", *SIZES, "job.replicas=2", "job.result_cache_bytes=0", "job.warm_up=[[1,4]]")
    prompts = [f"{'word ' * (number % 5)}number {number}" for number in range(10)]

    def ask(number: int) -> str:
        response = served.complete(prompts[number], max_tokens=12, stream=number % 2 == 0)
        return text_of(list(events(response))) if number % 2 == 0 else response.json()["choices"][0]["text"]

    with ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(ask, range(10)))
    assert texts == [alone(prompt, 12) for prompt in prompts]
    seeded = [served.complete("x", max_tokens=12, temperature=1, seed=5).json()["choices"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    logprobs = served.complete("x", max_tokens=3, logprobs=2).json()["choices"][0]["logprobs"]
    for chosen, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert chosen == pytest.approx(max(top.values()), abs=1e-5)
    odd = served.http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "temperature": 0.5, "num_beams": 2})
    assert odd.status_code in (200, 400)
    assert served.complete("fine").status_code == 200
    assert served.stop() == 0


def test_adapters_are_served_beside_the_base_model(serve: Start, tmp_path: Path) -> None:
    import torch

    from launcher.config.compose import compose
    from launcher.inference.engine.model_loader import load_model
    from launcher.inference.tokenizer import byte_tokenizer
    from tests.inference.peft_adapters import GPT2, save_adapter

    run = compose(["job=serve", "model=gpt2_tiny", *SIZES, "backend.ranks=1", "tracker=local"]).run
    base, words = load_model(run, device=torch.device("cpu")), byte_tokenizer()
    ids = torch.tensor([words.encode("one prompt")])
    expected, options = {}, []
    for name in (MODEL, *GPT2):
        model = base if name == MODEL else save_adapter(base, tmp_path / name, seed=1, **GPT2[name])
        found = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        expected[name] = words.decode(found[0, ids.shape[1] :].tolist())
        options += [] if name == MODEL else [f"job.adapters.{name}={tmp_path / name}"]
    assert len(set(expected.values())) == 3
    served = serve("job.engine=paged", *SIZES, "job.warm_up=[[1,4]]", *options)
    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(lambda name: served.complete("one prompt", model=name, max_tokens=12).json(), expected)
        texts = {answer["model"]: answer["choices"][0]["text"] for answer in answers}
    assert texts == expected
    listed = served.http.get("/v1/models").json()["data"]
    assert [each["id"] for each in listed] == list(expected)
    assert served.complete("one prompt", model="other").status_code == 404
    assert served.metric("requests_by_model_total", model_name="all") == 1
    assert served.stop() == 0
