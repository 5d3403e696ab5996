"""Requests with images in the engine: the tokens that Transformers generates for each of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import image_model
import pytest

from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineRequest, InvalidRequest
from launcher.inference.engine.paged_engine import PagedEngine, paged_engine_for
from tests.inference.image_models import NEW_TOKENS, ImageModel, write_model
from tests.inference.models import engine as text_engine
from tests.inference.models import finish, tokens

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
MIXED: Sequence[Sequence[str | int]] = (
    [1, "What is this?"],
    ["No image at all."],
    ["First ", 2, " and then ", 3, ": compare them."],
    [1, "What is this?"],
    [4, "What is this?"],
    ["Only text, but a longer one. " * 6],
    [1, 1, "Twice."],
    [5, "x"],
)
"""Eight requests; with chunks of 24 tokens images are cut, and the cache is too small for all at once."""


@pytest.fixture(scope="module", params=image_model.KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    folder = tmp_path_factory.mktemp("images") / request.param
    write_model(folder, request.param)
    return ImageModel(folder)


def engine_of(model: ImageModel, *, kernels: bool = True, **limits: object) -> PagedEngine:
    return paged_engine_for(model.load(), limits=EngineLimits(**limits), eos_token_ids=(), kernels=kernels)


def requests_of(model: ImageModel, contents: Sequence[Sequence[str | int]], files: Path) -> list[EngineRequest]:
    made = (model.prompt(content, files) for content in contents)
    return [
        EngineRequest(id=f"{n}", prompt=ids, images=images, sampling=GREEDY) for n, (ids, images) in enumerate(made)
    ]


def test_eight_mixed_requests_at_once_get_what_transformers_gives_each(model: ImageModel, tmp_path: Path) -> None:
    engine = engine_of(model, prefill_chunk_size=24, kv_cache_tokens=1024)
    requests = requests_of(model, MIXED, tmp_path)
    alone = [model.alone(content) for content in MIXED]
    assert [list(request.prompt) for request in requests] == [ids for ids, _ in alone]
    updates = finish(engine, requests)
    assert [tokens(updates[request.id]) for request in requests] == [made for _, made in alone]
    assert alone[0][1] != alone[4][1], "the image decides the answer"
    assert engine._images is not None
    assert engine._images.num_encoded == 5
    assert not engine._images._of


def test_images_that_differ_never_share_keys_and_values(model: ImageModel, tmp_path: Path) -> None:
    """Two prompts of equal tokens: the second finds nothing of the first one's image in the cache, and vice versa."""
    engine = engine_of(model, max_num_seqs=1)
    contents = [["This text is the same for both. " * 2, number, "Which image is it? " * 3] for number in (1, 5)]
    first, second = requests_of(model, contents, tmp_path)
    assert first.prompt == second.prompt
    before = first.prompt.index(engine._images.token_id)  # type: ignore[union-attr]
    assert len(first.prompt) - before > 64
    expected = [model.alone(content)[1] for content in contents]
    assert expected[0] != expected[1]
    for number, cached in ((0, 0), (1, before // 32 * 32), (0, -1), (1, -1)):
        request = replace((first, second)[number], id=f"{number} {cached}")
        updates = finish(engine, [request])[request.id]
        assert tokens(updates) == expected[number]
        whole = (len(request.prompt) - 1) // 32 * 32
        assert updates[0].num_cached_tokens == (whole if cached == -1 else cached)


@pytest.mark.parametrize("model", ["qwen2_vl"], indirect=True)
def test_beams_drafts_and_preemption_keep_images(model: ImageModel, tmp_path: Path) -> None:
    contents = [[1, "a"], [4, "b"], [2, "c"]]
    drafting = engine_of(model, kernels=False, speculation="early_exit")
    requests = requests_of(model, contents, tmp_path)
    longest = max(len(request.prompt) for request in requests) + NEW_TOKENS
    engine = engine_of(model, kv_cache_tokens=32 * -(-longest // 32) + 64, enable_prefix_caching=False)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, num_beams=2)
    beams = replace(requests[0], id="beams", sampling=sampling)
    updates = finish(engine_of(model), [beams, *requests])
    assert tokens(updates["beams"]) == model.alone(contents[0], num_beams=2)[1]
    for other in (engine, drafting):
        updates = finish(other, requests)
        assert [tokens(updates[request.id]) for request in requests] == [model.alone(each)[1] for each in contents]


@pytest.mark.parametrize("model", ["llava"], indirect=True)
def test_one_image_that_fails_ends_its_request_alone(model: ImageModel, tmp_path: Path) -> None:
    engine = engine_of(model)
    good, bad, cancelled = requests_of(model, [[1, "good"], [5, "bad"], [6, "cancelled"]], tmp_path)
    Path(bad.images[0].file).unlink()
    with pytest.raises(InvalidRequest, match="image tokens"):
        engine.add(replace(good, id="more", images=(*good.images, *bad.images)))
    engine.add(cancelled)
    engine.cancel(cancelled.id)
    assert [output.finish_reason for output in engine.step()] == ["cancelled"]
    updates = finish(engine, [bad, good])
    assert updates[bad.id][-1].finish_reason == "error"
    assert "No such file" in updates[bad.id][-1].error
    assert tokens(updates[good.id]) == model.alone([1, "good"])[1]


@pytest.mark.parametrize("model", ["llava"], indirect=True)
def test_a_text_engine_refuses_images(model: ImageModel, tmp_path: Path) -> None:
    (request,) = requests_of(model, [[1, "x"]], tmp_path)
    with pytest.raises(InvalidRequest, match="takes text only"):
        text_engine("llama").add(replace(request, prompt=(1, 2, 3)))
