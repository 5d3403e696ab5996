"""Bodies that a server may be sent: right, nearly right, and made to cost it time. Hypothesis draws them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
MOST_BYTES = 2 << 20
"""Of one body: what a server takes by default."""

_TINY = (5e-324, 1e-310, 2.2250738585072014e-308, 1e-300, 1e-45, 1.1754943508222875e-38, 1e-8)
_EDGES = (0, 1, 2, 16, 20, 64, 65, 100, 256, 257, 1023, 1024, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 10**30)
_NUMBERS = st.one_of(
    st.sampled_from([sign * number for number in (*_TINY, *_EDGES, 1e308, 0.5, 2.0) for sign in (1, -1)]),
    st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True),
    st.integers(),
    st.integers(0, 300),
)
_TEXTS = st.one_of(
    st.text(max_size=30), st.sampled_from(["", "\0", "\ufffd", "😀", "a" * 300, "<|endoftext|>", "é" * 999])
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
_ANY = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=3), max_leaves=12
)
_ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool", ""])
_CONTENT = _TEXTS | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": _TEXTS}) | _ANY, max_size=3)
_MESSAGE = st.fixed_dictionaries({"role": _ROLES, "content": _CONTENT | _ANY})
_IDS = st.lists(st.integers(0, 260), max_size=8)
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.one_of(_TEXTS, _IDS, st.lists(_TEXTS, max_size=4), st.lists(_IDS, max_size=4), st.lists(_SCALARS)),
    "messages": st.lists(_MESSAGE, max_size=4),
    "tokens": _IDS | st.lists(_SCALARS, max_size=5),
    "stop": _TEXTS | st.lists(_TEXTS, max_size=18),
    "stop_token_ids": st.lists(_NUMBERS, max_size=70),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str) | _TEXTS, _NUMBERS, max_size=5),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans() | _ANY}),
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object"])}),
    **dict.fromkeys(("stream", "echo", "ignore_eos", "add_special_tokens"), st.booleans()),
    **dict.fromkeys(("user", "chat_template", "suffix", "no_such_field"), _TEXTS),
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"), _NUMBERS),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "top_k", "seed", "priority", "best_of"), _NUMBERS),
    **dict.fromkeys(("n", "num_beams", "no_repeat_ngram_size"), st.integers(0, 5) | _NUMBERS),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "min_tokens"), st.integers(0, 8) | _NUMBERS),
    **dict.fromkeys(("logprobs", "top_logprobs"), st.integers(0, 5) | st.booleans() | _NUMBERS),
}
_MESSAGES = [{"role": "user", "content": "abc"}]
_GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 3},
    "/v1/chat/completions": {"messages": _MESSAGES, "max_tokens": 3},
    "/tokenize": {"prompt": "abc"},
    "/detokenize": {"tokens": [97]},
}


def large_bodies(model: str) -> dict[str, tuple[str, bytes, int]]:
    """Return bodies made to hold the event loop: by what is large, the path, the body and the status of its answer.

    Right for a server of 4,096 tokens of context and 64 choices, with the tokenizer of bytes.
    """
    completions, chat = "/v1/completions", "/v1/chat/completions"
    biases, likely = dict.fromkeys(map(str, range(16_000)), 1), {"n": 8, "max_tokens": 900, "logprobs": 20}
    scored = {"prompt": ["a" * 4000] * 64, "max_tokens": 1, "echo": True}
    prompts = b'{"model":' + json.dumps(model).encode() + b',"prompt":['
    bodies: dict[str, tuple[str, Any, int]] = {
        "integers and a text": (completions, prompts + b"0," * 1_000_000 + b'"a"]}', 400),
        "as many as are parsed": (completions, prompts + b"0," * 260_000 + b'"a"]}', 400),
        "texts and an integer": (completions, prompts + b'"a",' * 250_000 + b"0]}", 400),
        "lists": (completions, prompts + b"[]," * 16_000 + b"[]]}", 400),
        "nested lists": (completions, prompts + (b"[" * 150 + b"]" * 150 + b",") * 6000 + b"0]}", 400),
        "a deep list": (completions, prompts + b"[" * 2_000_000, 400),
        "a deep object": (completions, b'{"a":' * 16_000, 400),
        "escaped quotes": (completions, prompts + b'"' + b'\\",' * 600_000, 400),
        "many fields": (completions, {f"a{number}": 1 for number in range(16_000)}, 400),
        "a long integer": (completions, b'{"seed":' + b"9" * 2_000_000 + b"}", 400),
        "long integers": (completions, prompts + (b"9" * 4300 + b",") * 480 + b"0]}", 400),
        "a long text": (completions, {"model": model, "prompt": "a" * 2_000_000}, 400),
        "a text of commas": (completions, {"model": model, "prompt": ",[{:" * 500_000}, 400),
        "a long name": (completions, {"a" * 2_000_000: 1}, 400),
        "stop strings": (completions, {"model": model, "prompt": "a", "stop": ["a"] * 200_000}, 400),
        "biases": (completions, {"model": model, "prompt": "a", "logit_bias": biases}, 400),
        "stop tokens": (completions, {"model": model, "prompt": "a", "stop_token_ids": ["a"] * 250_000}, 400),
        "wrong messages": (chat, {"model": model, "messages": [1] * 250_000}, 400),
        "messages": (chat, {"model": model, "messages": _MESSAGES * 2048}, 400),
        "parts": (chat, {"model": model, "messages": [{"role": "user", "content": [1] * 200_000}]}, 400),
        "text to tokenise": ("/tokenize", {"prompt": "a b" * 87_000}, 200),
        "too much text to tokenise": ("/tokenize", {"prompt": "a" * 300_000}, 400),
        "tokens": ("/detokenize", {"tokens": [97] * 65_536}, 200),
        "too many tokens": ("/detokenize", {"tokens": [97] * 65_537}, 400),
        "many prompts": (completions, {"model": model, **scored}, 200),
        "many choices": (completions, {"model": model, "prompt": "ab", "n": 64, "max_tokens": 500}, 200),
        "likely tokens": (completions, {"model": model, "prompt": "a", **likely}, 200),
    }  # fmt: skip
    return {
        name: (path, body if isinstance(body, bytes) else json.dumps(body).encode(), status)
        for name, (path, body, status) in bodies.items()
    }


def _changed(path: str, model: str) -> st.SearchStrategy[bytes]:
    """Bodies that are right but for some fields."""
    names = st.sets(st.sampled_from(sorted(_FIELDS)), max_size=4)
    fields = names.flatmap(
        lambda chosen: st.fixed_dictionaries({name: _FIELDS[name] | _ANY for name in sorted(chosen)})
    )
    return fields.map(lambda some: _dumps({"model": model, **_GOOD[path], **some}))


def _mutated(path: str, model: str) -> st.SearchStrategy[bytes]:
    """Bodies whose bytes are damaged."""
    good = _dumps({"model": model, **_GOOD[path]})
    places = st.tuples(st.integers(0, len(good)), st.integers(0, 4), st.binary(max_size=4))
    return places.map(lambda cut: good[: cut[0]] + cut[2] + good[cut[0] + cut[1] :])


_UNITS = (
    b"0,",
    b"1.5e-320,",
    b'"a",',
    b"[],",
    b"[0],",
    b"{},",
    b'{"a":0},',
    b"[[[[[[[[]]]]]]]],",
    b"null,",
    b"9" * 4300 + b",",
)
_FIELD_OF_LIST = ("prompt", "messages", "tokens", "stop", "stop_token_ids", "logit_bias", "user", "x")


def _large(model: str) -> st.SearchStrategy[bytes]:
    """Bodies of up to two megabytes that repeat one thing."""
    size = st.integers(1000, MOST_BYTES - 200)
    head = f'{{"model":{json.dumps(model)},"prompt":"a",'.encode()

    def lists(drawn: tuple[str, bytes, bytes, int]) -> bytes:
        name, unit, last, length = drawn
        return head + f'"{name}":['.encode() + unit * (length // len(unit)) + last + b"]}"

    def texts(drawn: tuple[str, str, int]) -> bytes:
        name, unit, length = drawn
        text = json.dumps(unit).encode()[1:-1]
        return head + f'"{name}":"'.encode() + text * (length // len(text)) + b'"}'

    last = st.sampled_from([b"0", b'"a"', b"[]", b"{}", b""])
    return st.one_of(
        st.tuples(st.sampled_from(_FIELD_OF_LIST), st.sampled_from(_UNITS), last, size).map(lists),
        st.tuples(
            st.sampled_from(_FIELD_OF_LIST), st.sampled_from(["a", " ", "a b", "é", '"', "[{,:", "\\"]), size
        ).map(texts),
        st.tuples(st.sampled_from([b"[", b'{"a":', b'[{"a":', b'"', b"\\", b"9", b" "]), size).map(
            lambda drawn: drawn[0] * (drawn[1] // len(drawn[0]))
        ),
        size.map(lambda length: _dumps({f"a{number}": number for number in range(length // 20)})),
        size.map(
            lambda length: _dumps(
                {"model": model, "prompt": "a", "logit_bias": {str(n): 1 for n in range(length // 12)}}
            )
        ),
    )


def requests(model: str, *, large: bool = True) -> st.SearchStrategy[tuple[str, bytes]]:
    """Paths with a body each.

    Args:
        model: its name.
        large: whether some are of megabytes.
    """

    def bodies(path: str) -> st.SearchStrategy[tuple[str, bytes]]:
        kinds = [_changed(path, model), _changed(path, model), _mutated(path, model), _ANY.map(_dumps), st.binary()]
        if large:
            kinds.append(_large(model))
        return st.one_of(kinds).map(lambda body: (path, body))

    return st.sampled_from(PATHS).flatmap(bodies)


def _dumps(value: Any) -> bytes:
    return json.dumps(value).encode()
