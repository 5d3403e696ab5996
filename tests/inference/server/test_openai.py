"""The ``openai`` client, for every field that is supported."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.inference.server.conftest import MODEL, Served

CHAT: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say abc"}]
RENDERED = "<system>be brief\n<user>say abc\n<assistant>"  # what an echo repeats


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "launcher"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="héllo ", max_tokens=14, temperature=0)
    assert answer.choices[0].text == "héllo héllo "
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 14, 21)


def test_default_length_is_openais(client: openai.OpenAI) -> None:
    assert client.completions.create(model=MODEL, prompt="a").usage.completion_tokens == 16


@pytest.mark.parametrize(
    "prompt", ["ab", [97, 98], ["ab", "ab"], [[97, 98], [97, 98]]], ids=["text", "ids", "texts", "lists of ids"]
)
def test_every_shape_of_prompt(client: openai.OpenAI, prompt: Any) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, temperature=0)
    assert {choice.text for choice in answer.choices} == {"abab"}
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))


def test_prompts_and_choices_in_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=2, temperature=0)
    assert [choice.text for choice in answer.choices] == ["aa", "aa", "bb", "bb"]
    assert answer.usage.prompt_tokens == 2


def test_a_seed_repeats_and_its_choices_differ(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> list[str]:
        answer = client.completions.create(
            model=MODEL, prompt="abcdefghijkl", max_tokens=20, temperature=1, **{"seed": 7, "n": 3, **more}
        )
        return [choice.text for choice in answer.choices]

    first = ask()
    assert ask() == first
    assert len(set(first)) == 3
    assert ask(n=1) == first[:1]
    assert ask(seed=-(2**63)) == ask(seed=-(2**63)) != first


def test_stop_strings(client: openai.OpenAI) -> None:
    for stop in ("cd", ["zz", "cd"]):
        answer = client.completions.create(model=MODEL, prompt="abcdef", max_tokens=50, temperature=0, stop=stop)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
        assert answer.usage.completion_tokens == 4  # those that were needed to see it


def test_a_stop_token_that_is_none_is_named_as_the_client_does(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stop_token_ids") as refused:
        client.completions.create(model=MODEL, prompt="a", max_tokens=2, extra_body={"stop_token_ids": [99_999]})
    assert refused.value.param == "stop_token_ids"


def test_stop_ids_are_no_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="abcdef", max_tokens=50, temperature=0, extra_body={"stop_token_ids": [ord("c")]}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
    later = client.completions.create(
        model=MODEL, prompt="abcdef", max_tokens=50, temperature=0, stop="c", extra_body={"min_tokens": 3}
    )
    assert later.choices[0].text == "abcdefab"


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="é!", max_tokens=4, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9", "!", "bytes:\\xc3"]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 4
    assert logprobs.text_offset == [0, 0, 1, 2]


def test_echo_of_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="ab", max_tokens=2, temperature=0, echo=True)
    assert answer.choices[0].text == "abab"


def test_fields_beyond_openai(client: openai.OpenAI) -> None:
    extra = {
        "top_k": 50,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "num_beams": 2,
        "length_penalty": 0.5,
        "ignore_eos": True,
        "priority": -3,
    }
    answer = client.completions.create(
        model=MODEL,
        prompt="ab",
        max_tokens=4,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"97": 5, "98": -100},
        user="alice",
        best_of=1,
        extra_body=extra,
    )
    assert answer.choices[0].text == "abab"


def test_streams_add_up(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=["héllo ", "wörld "],
            max_tokens=14,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "héllo héllo ", 1: "wörld wörld "}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 28


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_completion_tokens=len(RENDERED)
    )
    message = answer.choices[0].message
    assert (message.role, message.content, answer.object) == ("assistant", RENDERED, "chat.completion")
    assert answer.usage.prompt_tokens == len(RENDERED)


def test_parts_and_developers(client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: Any = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == "<system>x\n<user>ab\n<"


def test_a_chat_goes_to_the_end_of_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0)
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_as_a_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=CHAT, temperature=0, max_tokens=10, n=2, stream=True, logprobs=True, top_logprobs=1
        )
    )
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == RENDERED[:10]
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]
        tokens = [entry for choice in mine if choice.logprobs for entry in choice.logprobs.content]
        assert b"".join(bytes(entry.bytes) for entry in tokens) == RENDERED[:10].encode()
        assert all(len(entry.top_logprobs) == 1 for entry in tokens)


def test_a_template_that_refuses_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="begin with the user"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "assistant", "content": "a"}])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text"]),
        ("store", True),
    ],
)
def test_unsupported_fields_of_chats_are_named(client: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=MODEL, messages=CHAT, extra_body={field: value})
    assert refusal.value.body["param"].split(".")[0] == field


def test_unsupported_fields_of_completions_are_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model=MODEL, prompt="a", suffix="b")
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model=MODEL, prompt="a", best_of=3)


def test_tokens_there_and_back(served: Served) -> None:
    text = "héllo 漢字 🧪"
    ids = served.http.post("/tokenize", json={"prompt": text}).json()
    assert ids["count"] == len(text.encode()) == len(ids["tokens"])
    assert served.http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": text}
    chat = served.http.post("/tokenize", json={"messages": CHAT, "model": MODEL}).json()
    assert chat["count"] == len(RENDERED)
