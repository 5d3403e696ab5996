"""Rows to rendered examples to tokens, compared with Transformers' own masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from launcher.config.data.auto import AutoData
from launcher.config.data.bpe import END, train_byte_level_bpe
from launcher.config.data.chat_template import ChatTemplate, TemplateFailed, builtin_template, builtin_templates
from launcher.config.data.examples import (
    EncodedExample,
    ExampleEncoder,
    PreferencePair,
    RenderedExample,
    TextSegment,
    fit_example,
)
from launcher.errors import ConfigError

CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4. 🙂"},
    {"role": "user", "content": "And 3 × 3?"},
    {"role": "assistant", "content": " 9\n"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *CHAT]
SPECIAL = {"bos_token": "<s>", "eos_token": END}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = train_byte_level_bpe(["What is the answer? It is 4. The user and the assistant 🙂."] * 9, vocab_size=300)
    inner.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def encoded(example: RenderedExample, tokenizer: PreTrainedTokenizerFast) -> EncodedExample:
    return ExampleEncoder(tokenizer.backend_tokenizer, end_id=tokenizer.eos_token_id).encode(example)


def trained_text(example: RenderedExample) -> list[str]:
    return [segment.text for segment in example.segments if segment.is_trained]


@pytest.mark.parametrize("name", builtin_templates())
@pytest.mark.parametrize("messages", [CHAT, WITH_SYSTEM, CHAT[:2]])
def test_masks_of_built_in_templates_are_those_of_transformers(
    name: str, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast
) -> None:
    source = builtin_template(name)
    if name == "gemma" and messages is WITH_SYSTEM:
        with pytest.raises(TemplateFailed, match="the role system is not supported"):
            ChatTemplate(source, special_tokens=SPECIAL).render(messages)
        return
    expected = tokenizer.apply_chat_template(
        messages, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
    )
    example = ChatTemplate(source, special_tokens=SPECIAL).render_example(messages, train_on="assistant")
    found = encoded(example, tokenizer)
    assert list(found.ids) == expected["input_ids"]
    assert [int(one) for one in found.is_trained] == expected["assistant_masks"]


@pytest.mark.parametrize("name", builtin_templates())
def test_prefixes_find_what_generation_marks_say(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """A template without marks trains the same turns, and what a template writes after their end token."""
    source = builtin_template(name)
    marked = ChatTemplate(source, special_tokens=SPECIAL)
    unmarked = ChatTemplate(
        source.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""), special_tokens=SPECIAL
    )
    assert marked.has_generation_marks
    assert not unmarked.has_generation_marks
    one, other = (template.render_example(CHAT, train_on="assistant") for template in (marked, unmarked))
    assert one.text == other.text
    expected = [text + "\n" * (name == "plain") for text in trained_text(one)]
    assert trained_text(other) == expected


def test_a_template_that_removes_earlier_reasoning_is_marked_where_the_content_stands() -> None:
    source = (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
        "{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = ChatTemplate(source, special_tokens={"eos_token": "<|im_end|>"})
    messages: list[dict[str, Any]] = [dict(message) for message in CHAT]
    messages[1]["content"] = "<think>sum</think>It is 4."
    example = template.render_example(messages, train_on="assistant")
    assert example.text == template.render(messages)
    assert trained_text(example) == ["It is 4.<|im_end|>", " 9\n<|im_end|>\n"]


def test_a_turn_that_the_template_rewrites_is_refused() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% if loop.last %}.{% endif %}{% endfor %}")
    with pytest.raises(TemplateFailed, match="turn 2 cannot be found"):
        template.render_example(CHAT, train_on="assistant")


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("assistant", ["It is 4. 🙂<|im_end|>\n", " 9\n<|im_end|>\n"]), ("last", [" 9\n<|im_end|>\n"])],
)
def test_train_on_chooses_turns(train_on: Any, expected: list[str]) -> None:
    template = ChatTemplate(builtin_template("chatml"))
    assert trained_text(template.render_example(CHAT, train_on=train_on)) == expected
    everything = template.render_example(CHAT, train_on="all")
    assert trained_text(everything) == [everything.text]


@pytest.mark.parametrize(
    ("source", "num_renderings"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}", 1),
        ("{% for m in messages %}{% set text %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
         "{{ text }};{% endfor %}", 2),
        ("{% for m in messages %}{% filter trim %}{% generation %}{{ m.content }}{% endgeneration %}{% endfilter %}"
         ";{% endfor %}", 2),
    ],
)  # fmt: skip
def test_a_template_that_could_read_its_marks_is_rendered_without_them_too(
    source: str, num_renderings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderings = []
    render = ChatTemplate._rendered

    def counted(self: ChatTemplate, *given: Any, **options: Any) -> Any:
        renderings.append(options)
        return render(self, *given, **options)

    monkeypatch.setattr(ChatTemplate, "_rendered", counted)
    messages = [{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]
    example = ChatTemplate(source).render_example(messages, train_on="assistant")
    assert trained_text(example) == ["one", "two"]
    assert len(renderings) == num_renderings


def test_a_template_whose_text_depends_on_its_marks_is_refused() -> None:
    source = "{% set text %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endset %}{{ text | length }}"
    with pytest.raises(TemplateFailed, match="no text that chat template marks as generated"):
        ChatTemplate(source + "{{ text }}").render_example(CHAT, train_on="assistant")


def test_marks_in_a_message_are_not_taken_for_the_template_s() -> None:
    template = ChatTemplate(builtin_template("chatml"))
    marked = [{"role": "user", "content": "\ue000generation\ue001 a\ue000end\ue001"}, CHAT[1]]
    with pytest.raises(TemplateFailed, match="no text that chat template marks as generated"):
        template.render_example(marked, train_on="assistant")


def test_a_template_runs_in_a_sandbox() -> None:
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ namespace.__init__.__globals__ }}",
    ):
        with pytest.raises(TemplateFailed):
            ChatTemplate(source).render(CHAT)


def test_tokens_of_the_last_character_are_all_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    """An emoji outside the vocabulary is several tokens with the same offsets."""
    example = RenderedExample((TextSegment("a", False), TextSegment("b🦜", True), TextSegment("c", False)))
    found = encoded(example, tokenizer)
    assert tokenizer.decode([i for i, yes in zip(found.ids, found.is_trained, strict=True) if yes]) == "b🦜"
    assert found.ids[-1] == tokenizer.eos_token_id
    assert found.is_trained[-1] is False


def test_spaces_count_though_the_tokenizer_trims_its_offsets() -> None:
    from tokenizers import processors

    inner = train_byte_level_bpe(["a b c"], vocab_size=258)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    example = RenderedExample((TextSegment("a", False), TextSegment("  b", True)))
    found = ExampleEncoder(inner, end_id=None).encode(example)
    assert found.is_trained == (False, True, True)
    assert inner.encode("a  b").offsets == [(0, 1), (2, 2), (3, 4)], "the caller's tokenizer is not changed"


def test_a_batch_is_encoded_as_its_examples_are(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(builtin_template("chatml")).render_example(CHAT, train_on="assistant")
    examples = [chat, RenderedExample((TextSegment("a", False), TextSegment(" b", True))), chat]
    encoder = ExampleEncoder(tokenizer.backend_tokenizer, end_id=tokenizer.eos_token_id)
    assert encoder.encode_batch(examples) == [encoder.encode(one) for one in examples]


def test_long_examples() -> None:
    example = EncodedExample((1, 2, 3, 4), (False, False, True, True))
    assert fit_example(example, 4, "refuse") is example
    with pytest.raises(ValueError, match="has 4 tokens, and a sequence takes 3"):
        fit_example(example, 3, "refuse")
    assert fit_example(example, 3, "truncate") == EncodedExample((1, 2, 3), (False, False, True))
    assert fit_example(example, 2, "truncate") is None, "nothing is left to learn"
    assert fit_example(example, 3, "drop") is None


def rows(folder: Path, *given: Any, **options: Any) -> AutoData:
    file = folder / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return AutoData(path=str(file), **{"chat_template": "chatml", **options})


def examples(data: AutoData) -> list[Any]:
    return list(data.examples(data.template(None)))


ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TURNS = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": ASKED}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "messages"),
        ({"prompt": "q", "response": "a"}, "prompt_response"),
        ({"prompt": "q", "completion": "a"}, "prompt_response"),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, "prompt_response"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASKED[1]]}, "messages"),
    ],
)
def test_shapes_become_the_same_conversation(row: dict[str, Any], shape: str, tmp_path: Path) -> None:
    data = rows(tmp_path, row)
    assert [source.shape for source in data.sources()] == [shape]
    expected = RenderedExample((TextSegment(TURNS, False), TextSegment("a<|im_end|>\n", True)), has_special_tokens=True)
    assert examples(data) == [expected]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": ASKED, "rejected": [ASKED[0], {"role": "assistant", "content": "b"}]},
        {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": [{"role": "assistant", "content": "b"}]},
        {"prompt": "q", "chosen": ASKED, "rejected": [ASKED[0], {"role": "assistant", "content": "b"}]},
    ],
)
def test_preferences_become_pairs(row: dict[str, Any], tmp_path: Path) -> None:
    (pair,) = examples(rows(tmp_path, row))
    assert isinstance(pair, PreferencePair)
    assert pair.prompt.text == TURNS
    assert pair.chosen.segments == (TextSegment(TURNS, False), TextSegment("a<|im_end|>\n", True))
    assert pair.rejected.segments == (TextSegment(TURNS, False), TextSegment("b<|im_end|>\n", True))


def test_without_a_template_prompt_and_response_stay_as_they_are(tmp_path: Path) -> None:
    (example,) = examples(rows(tmp_path, {"prompt": "1 + 1 =", "response": " 2"}, chat_template="none"))
    assert example == RenderedExample((TextSegment("1 + 1 =", False), TextSegment(" 2", True)))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": None}, "messages is null"),
        ({"messages": "hello"}, "messages takes a list of messages, and is text"),
        ({"messages": [{"role": "user", "content": "q"}]}, "has no assistant turn to train on"),
        ({"messages": [{"role": "bot", "content": "q"}]}, "messages[0].role is 'bot'; roles are"),
        ({"messages": [{"content": "q"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content takes text, and is a number"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": " "}]}, "messages[1].content is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "and the model takes text alone"),
        ({"messages": ["hi"]}, "messages[0] takes an object with role and content, and is text"),
        ({"prompt": "q", "response": None}, "response is null"),
        ({"prompt": "q"}, "response is missing"),
        ({"prompt": " ", "response": "a"}, "prompt is empty"),
        ({"prompt": "q", "response": 4}, "takes text, and is a number"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected is empty"),
        ({"conversations": [{"from": "martian", "value": "q"}]}, "conversations[0].from='martian' is no known role"),
        ({"prompt": "\ud800", "response": "a"}, "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_by_file_and_line_or_skipped(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    good: dict[str, Any] = {"messages": ASKED}
    if "prompt" in row or "response" in row:
        good = {"prompt": "q", "response": "a"}
    if "chosen" in row:
        good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    if "conversations" in row:
        good = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    data = rows(tmp_path, good, row, good)
    with pytest.raises(ConfigError) as refused:
        examples(data)
    assert f"line 2 of {tmp_path / 'x.jsonl'} " in refused.value.why
    assert why in refused.value.why
    assert "data.on_bad_row=skip" in refused.value.fix
    assert len(examples(rows(tmp_path, good, row, good, on_bad_row="skip"))) == 2


def test_skipped_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples(rows(tmp_path, {"messages": ASKED}, {"messages": []}, {"messages": None}, on_bad_row="skip"))
    file = tmp_path / "x.jsonl"
    expected = f"2 of 3 rows of {file} are skipped; the first: line 2 of {file} messages is empty\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(ConfigError, match="none of its 2 rows is an example"):
        examples(rows(tmp_path, {"messages": []}, {"messages": None}, on_bad_row="skip"))


@pytest.mark.parametrize(
    ("row", "why", "fix"),
    [
        ({"a": "b", "c": "d"}, "has the columns a, c, which are of no known shape", "data.text_column"),
        ({"a": "b", "c": 1}, "which are of no known shape", "set data.text_column=a"),
        ({"text": "x", "messages": ASKED}, "conversations (messages) and of text (text)", "set data.shape=messages"),
        ({"text": "x", "prompt": "q", "response": "a"}, "(prompt, response) and of text", "data.shape=prompt_response"),
    ],
)  # fmt: skip
def test_unknown_and_ambiguous_shapes_are_refused_with_the_columns(
    row: dict[str, Any], why: str, fix: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        rows(tmp_path, row).sources()
    assert why in refused.value.why
    assert fix in refused.value.fix


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {"ask": "q", "reply": "a", "text": "x"}
    data = rows(tmp_path, row, prompt_column="ask", response_column="reply")
    assert [example.text for example in examples(data)] == [f"{TURNS}a<|im_end|>\n"]
    with pytest.raises(ConfigError, match="has no column asks; it has ask, reply, text") as refused:
        rows(tmp_path, row, prompt_column="asks", response_column="reply").sources()
    assert "ask" in refused.value.fix.split("data.prompt_column: ")[1]
    chosen = rows(tmp_path, {"text": "x", "messages": ASKED}, shape="text")
    assert [example.text for example in examples(chosen)] == ["x"]
