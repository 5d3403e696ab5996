"""Chats become the text that Transformers makes of them, by the template that is named, in servers and files alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.config.compose import compose
from launcher.config.data.chat_template import read_templates
from launcher.config.data.rows import Record
from launcher.config.inference import EngineLimits
from launcher.config.prompt_file import BadLine
from launcher.errors import ConfigError, ConfigErrors
from launcher.inference.batch.requests import parse_request
from launcher.inference.engine.echo_engine import EchoEngine
from launcher.inference.tokenizer import (
    ChatTemplateNotFound,
    InvalidMessages,
    TextTokenizer,
    byte_tokenizer,
    load_text_tokenizer,
    normalize_messages,
)
from launcher.protocol.rundir import RunDir
from tests.inference.server.in_process import MODEL, InProcess, in_process

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = "{{ '[TOOLS]' if not tools }}" + PLAIN
CHAT = [
    {"role": "system", "content": "be {{ brief }}"},
    {"role": "user", "content": "hi 😀"},
    {"role": "assistant", "content": None},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
]
FORMS = ("one", "list", "files", "list and files", "named alone")


def folder_of(form: str, folder: Path) -> Path:
    """Write the byte tokenizer with templates as models have them."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(byte_tokenizer()._inner.to_str())
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    if form == "one":
        settings["chat_template"] = PLAIN
    if form in ("list", "list and files"):
        settings["chat_template"] = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}]
    if form == "named alone":
        settings["chat_template"] = [{"name": "tool_use", "template": TOOLS}, {"name": "rag", "template": PLAIN}]
    if form in ("files", "list and files"):
        (folder / "chat_template.jinja").write_text(PLAIN)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text(TOOLS)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_text_is_what_transformers_makes_of_it(form: str, tmp_path: Path) -> None:
    folder = folder_of(form, tmp_path)
    words, stock = load_text_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    messages = normalize_messages(CHAT)
    names = sorted(read_templates(folder))
    assert names == sorted(stock.chat_template if isinstance(stock.chat_template, dict) else ["default"])
    for name in (None, *names):
        if name is None and "default" not in names:
            with pytest.raises(ChatTemplateNotFound, match="it has rag, tool_use"):
                words.render(messages)
            continue
        inner = stock.chat_template[name or "default"] if len(names) > 1 else None
        expected = stock.apply_chat_template(messages, chat_template=inner, tokenize=False, add_generation_prompt=True)
        assert words.render(messages, name) == expected
        assert load_text_tokenizer(folder, template=name).render(messages) == expected
    for strange in ("tool-use", PLAIN, "{{ 7 * 6 }}"):
        with pytest.raises(ChatTemplateNotFound, match="no chat template"):
            words.render(messages, strange)
    with pytest.raises(ConfigError, match=r"job.chat_template=tool_usr"):
        load_text_tokenizer(folder, template="tool_usr")


def test_a_tokenizer_without_a_template_takes_a_name_or_a_file(tmp_path: Path) -> None:
    folder = folder_of("none", tmp_path)
    assert not load_text_tokenizer(folder).has_chat_template
    messages = normalize_messages([{"role": "user", "content": "Hello"}])
    named = load_text_tokenizer(folder, template="chatml")
    assert named.render(messages) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    own = load_text_tokenizer(folder, template=str(tmp_path / "mine.jinja"))
    assert own.render(messages) == "Hello!"
    with pytest.raises(ChatTemplateNotFound):  # clients choose among the tokenizer's
        own.render(messages, "mine.jinja")


def test_templates_of_the_plan(tmp_path: Path) -> None:
    folder = folder_of("list", tmp_path / "tokenizer")

    def problems(*words: str) -> str:
        run = compose(["job=generate", "job.engine=echo", "job.chat_template=tool_usr", *words]).run
        found = [*run.job.validate(), *run.job.validate_machine(run, RunDir(tmp_path))]
        return " ".join(map(str, found))

    assert "did you mean tool_use?" in problems(f"job.tokenizer={folder}")
    assert "did you mean tool_use?" in problems(f"model.weights={folder}")
    assert problems(f"job.tokenizer={folder}", "job.chat_template=tool_use") == ""
    assert problems(f"job.tokenizer={folder}", "job.chat_template=chatml") == ""
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}")
    assert "is no valid Jinja: line 1" in problems(f"job.tokenizer={folder}", f"job.chat_template={tmp_path}/bad.jinja")
    with pytest.raises(ConfigErrors, match="leave it out for the tokenizer's default"):
        problems(f"job.tokenizer={folder}", "job.chat_template=auto")
    with pytest.raises(ConfigErrors, match=r"job.tokenizer=bytes has no chat templates"):
        problems("job.tokenizer=bytes")


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("hi", "messages"),
        ([], "messages"),
        ([5], "messages.0"),
        ([{"role": "user"}], "messages.0"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([CHAT[1], {"role": "user", "content": 5}], "messages.1.content"),
        ([{"role": 5, "content": ""}], "messages.0.role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages.0.content.0"),
        ([{"role": "user", "content": ["a"]}], "messages.0.content.0"),
        ([{"role": "user", "content": "a", "name": "b"}], "messages.0.name"),
    ],
)
def test_what_is_no_chat_is_refused_by_its_place(
    messages: Any, field: str, words: TextTokenizer, server: InProcess
) -> None:
    with pytest.raises(InvalidMessages) as bad:
        normalize_messages(messages)
    assert bad.value.field == field
    with pytest.raises(BadLine, match=r"^messages: ") as refused:
        line(words, messages=messages)
    assert field in str(refused.value)
    (answer,) = server.post("/v1/chat/completions", {"model": MODEL, "messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_text_tokenizer(folder_of("list", tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def server(words: TextTokenizer) -> Iterator[InProcess]:
    with in_process(
        EchoEngine(limits=EngineLimits(), max_model_len=512, vocab_size=257, eos_token_ids=(256,)), words
    ) as begun:
        yield begun


def line(words: TextTokenizer, **fields: Any) -> tuple[int, ...]:
    return parse_request(Record(0, 1, fields), {"max_tokens": 5}, words, seed=0).prompt


@pytest.mark.parametrize("template", [None, "default", "tool_use"])
def test_servers_and_files_make_the_same_of_a_chat(
    server: InProcess, words: TextTokenizer, template: str | None
) -> None:
    asked = {"messages": CHAT, **({"chat_template": template} if template else {})}
    ids = line(words, **asked)
    assert words.decode(ids) == words.render(normalize_messages(CHAT), template).replace("<|endoftext|>", "")
    assert "None" not in words.decode(ids)
    (answer,) = server.post("/tokenize", asked)
    assert tuple(answer.json()["tokens"]) == ids
    ask = {"model": MODEL, "temperature": 0, "max_tokens": len(ids), "ignore_eos": True, **asked}
    (answer,) = server.post("/v1/chat/completions", ask)
    assert answer.json()["choices"][0]["message"]["content"] == words.decode(ids)


def test_a_template_that_is_not_there_is_named_and_never_run(server: InProcess, words: TextTokenizer) -> None:
    for name in ("rag", "{{ 7 * 6 }}", PLAIN[:200]):
        (answer,) = server.post("/v1/chat/completions", {"model": MODEL, "messages": CHAT, "chat_template": name})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "chat_template"
        assert "it has default, tool_use" in answer.json()["error"]["message"]
        with pytest.raises(BadLine, match=r"chat_template: .*it has default, tool_use"):
            line(words, messages=CHAT, chat_template=name)
    with pytest.raises(BadLine, match="chat_template: is for messages"):
        line(words, prompt="a", chat_template="default")
    (answer,) = server.post("/tokenize", {"prompt": "a", "chat_template": "default"})
    assert answer.json()["error"]["param"] == "chat_template"


def test_a_template_that_fails_in_any_way_is_an_answer_to_its_request(tmp_path: Path) -> None:
    failing_ones = ("{{ 1 // 0 }}", "{{ messages[9].x.y }}", "{{ raise_exception('no') }}", "{% if %}")
    for number, failing in enumerate(failing_ones):
        folder = folder_of("one", tmp_path / str(number))
        (folder / "chat_template.jinja").write_text(failing)
        with pytest.raises(ValueError, match=r"zero|no|Expected"):
            load_text_tokenizer(folder).render(normalize_messages(CHAT))
