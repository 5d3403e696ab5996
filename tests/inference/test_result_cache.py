"""Results that are kept: by whatever decides them, within bytes and time, each computed once at a time."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace

import pytest

from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineOutput, EngineRequest, GeneratedToken, RequestImage
from launcher.inference.server.request_state import GenerationFailed, RequestState
from launcher.inference.server.result_cache import ResultCache, result_key

GREEDY = SamplingParams(max_tokens=4)


def request_state(name: str = "r") -> RequestState:
    return RequestState(EngineRequest(id=name, prompt=(1,), sampling=GREEDY))


def fill(results: ResultCache, key: str, *, tokens: int = 4) -> None:
    mine = request_state()
    assert results.find(key, mine)[1] == "miss"
    mine.handle_output(
        EngineOutput(
            request_id="r", tokens=tuple(GeneratedToken(id=number) for number in range(tokens)), finish_reason="length"
        )
    )
    results.complete(key, mine)


def test_hits_have_the_tokens_and_the_least_used_goes_first() -> None:
    results = ResultCache(2500, ttl_s=60)
    for key in ("a", "b", "c"):
        fill(results, key)
    again, status = results.find("a", request_state())
    assert (status, [token.id for token in again.tokens], again.finish_reason) == ("hit", [0, 1, 2, 3], "length")
    fill(results, "d")  # there is room for three
    assert results.find("b", request_state())[1] == "miss"
    assert results.find("a", request_state())[1] == "hit"
    assert results.bytes <= results.max_bytes
    assert (results.hits, results.misses) == (2, 5)


def test_what_is_larger_than_all_room_is_not_kept() -> None:
    results = ResultCache(1000, ttl_s=60)
    fill(results, "a")
    fill(results, "large", tokens=100)
    assert len(results) == 1


def test_time_runs_out() -> None:
    now = [0.0]
    results = ResultCache(10_000, ttl_s=60, now=lambda: now[0])
    fill(results, "a")
    now[0] = 59.9
    assert results.find("a", request_state())[1] == "hit"
    now[0] = 60.0
    assert results.find("a", request_state())[1] == "miss"
    assert results.bytes == 0


def test_without_room_nothing_is_shared() -> None:
    results = ResultCache(0, ttl_s=60)
    first = request_state()
    assert results.find("a", first) == (first, "bypass")
    assert results.find("a", request_state())[1] == "bypass"


def test_one_flies_for_all_and_failures_are_not_kept() -> None:
    results = ResultCache(10_000, ttl_s=60)
    first = request_state()
    results.find("a", first)
    assert results.find("a", request_state()) == (first, "shared")
    first.fail(GenerationFailed("lost"))
    results.complete("a", first)
    assert results.find("a", request_state())[1] == "miss"


def test_late_readers_read_everything() -> None:
    async def scene() -> None:
        shared = request_state()

        async def read() -> list[int]:
            return [token.id async for token in shared.read()]

        early = asyncio.create_task(read())
        await asyncio.sleep(0)
        shared.handle_output(EngineOutput(request_id="r", tokens=(GeneratedToken(id=1),)))
        late = asyncio.create_task(read())
        await asyncio.sleep(0)
        shared.handle_output(
            EngineOutput(request_id="r", tokens=(GeneratedToken(id=2), GeneratedToken(id=3)), finish_reason="length")
        )
        assert await early == await late == [1, 2, 3]

    asyncio.run(scene())


def test_after_a_loss_the_same_is_not_sent_twice() -> None:
    again = request_state()
    again.handle_output(EngineOutput(request_id="r", tokens=(GeneratedToken(id=1), GeneratedToken(id=2))))
    again.replay()
    again.handle_output(EngineOutput(request_id="r", tokens=(GeneratedToken(id=1),)))
    assert len(again.tokens) == 2
    again.handle_output(
        EngineOutput(request_id="r", tokens=(GeneratedToken(id=2), GeneratedToken(id=3)), finish_reason="length")
    )
    assert [token.id for token in again.tokens] == [1, 2, 3]


def test_after_a_loss_something_else_is_an_error() -> None:
    again = request_state()
    again.handle_output(EngineOutput(request_id="r", tokens=(GeneratedToken(id=1),)))
    again.replay()
    again.handle_output(EngineOutput(request_id="r", tokens=(GeneratedToken(id=9),)))
    assert isinstance(again.error, GenerationFailed)


OTHER = {
    "max_tokens": 5,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_k": 1,
    "top_p": 0.5,
    "min_p": 0.5,
    "repetition_penalty": 2.0,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "no_repeat_ngram_size": 2,
    "logit_bias": ((1, 1.0),),
    "stop_token_ids": (1,),
    "ignore_eos": True,
    "seed": 1,
    "logprobs": 1,
    "num_beams": 2,
    "length_penalty": 2.0,
}


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_every_way_to_sample_is_in_the_key(name: str) -> None:
    changed = replace(GREEDY, **{name: OTHER[name]})
    assert result_key("x", (1,), changed, ()) != result_key("x", (1,), GREEDY, ())


def test_what_else_is_in_the_key() -> None:
    key = result_key("x", (1, 2), GREEDY, ("a", "b"))
    assert key == result_key("x", (1, 2), GREEDY, ("b", "a"))
    assert (
        len(
            {
                key,
                *(
                    result_key(*other)
                    for other in (
                        ("y", (1, 2), GREEDY, ("a", "b")),
                        ("x", (1,), GREEDY, ("a", "b")),
                        ("x", (1, 2), GREEDY, ("ab",)),
                    )
                ),
            }
        )
        == 4
    )


def test_images_are_in_the_key() -> None:
    image = RequestImage(content="a", file="/a", num_tokens=1)
    kinds = ((), (image,), (replace(image, content="b"),), (image, image))
    assert len({result_key("x", (1,), GREEDY, (), images=images) for images in kinds}) == 4
    moved = (replace(image, file="/b"),)
    assert result_key("x", (1,), GREEDY, (), images=moved) == result_key("x", (1,), GREEDY, (), images=(image,))
