"""Parts of rows that decide what is trained: optional columns, conversations as text, marked turns, tools, labels."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from launcher.config.data.auto import AutoData
from launcher.config.data.chat_template import ChatTemplate, TemplateFailed, builtin_template, stand_in_template
from launcher.config.data.examples import PreferencePair, RenderedExample
from launcher.errors import ConfigError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


ASKED = [user("q"), assistant("a")]
OTHER = [user("q"), assistant("b")]
PROMPT = turn("user", "q") + "<|im_start|>assistant\n"
EARLIER = turn("user", "x") + turn("assistant", "y")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
WITH_TOOLS = (
    "{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{%- for message in messages %}[{{ message.role }}]{% generation %}{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}{{ call.function.name }}={{ call.function.arguments | tojson }}"
    "{%- endfor %}{% endgeneration %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def written(folder: Path, rows: list[dict[str, Any]], ending: str) -> Path:
    """Write rows as a file; a table holds conversations as JSON text."""
    file = folder / f"rows.{ending}"
    if ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file
    if ending == "json":
        file.write_text(json.dumps(rows))
        return file
    texts = [
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows
    ]
    if ending == "csv":
        with file.open("w", newline="") as stream:
            table = csv.DictWriter(stream, list(texts[0]))
            table.writeheader()
            table.writerows(texts)
    else:
        pa.parquet.write_table(pa.Table.from_pylist(texts), file)
    return file


def examples(folder: Path, rows: list[dict[str, Any]], ending: str = "jsonl", **options: Any) -> list[Any]:
    data = AutoData(path=str(written(folder, rows, ending)), **{"chat_template": "chatml", **options})
    return list(data.examples(data.template(None)))


def trained(example: RenderedExample) -> list[str]:
    return [segment.text for segment in example.segments if segment.is_trained]


def refusal(folder: Path, row: dict[str, Any], **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        examples(folder, [row], **options)
    return refused.value


@pytest.fixture
def with_tools(tmp_path: Path) -> str:
    """Return the file of a template that writes tools and calls of them."""
    file = tmp_path / "tools.jinja"
    file.write_text(WITH_TOOLS)
    return str(file)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("row", "late", "text"),
    [
        ({"messages": ASKED}, {"system": "S"}, turn("system", "S") + PROMPT),
        ({"messages": ASKED}, {"system_prompt": "S"}, turn("system", "S") + PROMPT),
        ({"prompt": "q", "response": "a"}, {"system": "S"}, turn("system", "S") + PROMPT),
        ({"instruction": "q", "output": "a"}, {"input": "i"}, turn("user", "q\n\ni") + "<|im_start|>assistant\n"),
        ({"instruction": "q", "output": "a"}, {"history": [["x", "y"]]}, EARLIER + PROMPT),
        ({"chosen": "q? a", "rejected": "q? b"}, {"prompt": "q", "system": "S"}, turn("system", "S") + PROMPT),
    ],
)  # fmt: skip
def test_a_column_that_the_first_rows_lack_is_read(
    row: dict[str, Any], late: dict[str, Any], text: str, ending: str, tmp_path: Path
) -> None:
    *_, without, last = examples(tmp_path, [row] * 1030 + [row | late], ending)
    first, last = (one.prompt.text if isinstance(one, PreferencePair) else one.text for one in (without, last))
    assert last.startswith(text)
    assert not first.startswith(text)


def test_tools_that_the_first_rows_lack_are_written(tmp_path: Path, with_tools: str) -> None:
    row = {"messages": ASKED}
    found = examples(tmp_path, [row] * 1030 + [row | {"tools": TOOLS}], chat_template=with_tools)
    assert [("weather" in one.text) for one in found] == [False] * 1030 + [True]


def test_a_file_that_has_a_column_more_than_the_first_goes_with_it(tmp_path: Path) -> None:
    for number, more in enumerate(({}, {"system": "S"})):
        pa.parquet.write_table(pa.Table.from_pylist([{"messages": ASKED, **more}]), tmp_path / f"{number}.parquet")
    data = AutoData(path=str(tmp_path / "*.parquet"), chat_template="chatml")
    texts = [example.text for example in data.examples(data.template(None)) if isinstance(example, RenderedExample)]
    assert texts == [PROMPT + "a<|im_end|>\n", turn("system", "S") + PROMPT + "a<|im_end|>\n"]


def test_two_system_prompts_in_a_row_are_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, {"messages": ASKED, "system": "S", "system_prompt": "T"})
    assert "has one system prompt in system and another in system_prompt" in error.why


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": ASKED, "rejected": OTHER},
        {"chosen": ASKED, "rejected": OTHER},
        {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": OTHER[1:]},
        {"prompt": ASKED[:1], "chosen": ASKED, "rejected": OTHER},
        {"prompt": "q", "chosen": ASKED[1], "rejected": OTHER[1]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": ASKED[1], "rejected": OTHER[1]},
    ],
)
def test_conversations_of_preferences_are_read_from_json_text(row: dict[str, Any], ending: str, tmp_path: Path) -> None:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    (pair,) = examples(tmp_path, [texts], ending)
    assert pair.prompt.text == PROMPT
    assert (trained(pair.chosen), trained(pair.rejected)) == (["a<|im_end|>\n"], ["b<|im_end|>\n"])


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_conversations_of_prompts_and_completions_are_read_from_json_text(ending: str, tmp_path: Path) -> None:
    row = {"prompt": json.dumps(ASKED[:1]), "completion": json.dumps(ASKED[1:])}
    (example,) = examples(tmp_path, [row], ending)
    assert example.text == PROMPT + "a<|im_end|>\n"


@pytest.mark.parametrize(
    "answer", ['[{"role": "admin"}]', "[1, 2]", '{"content": "x"}', "[see above]", '[{"from": "Rome"']
)
def test_other_json_stays_the_text_of_a_response(answer: str, tmp_path: Path) -> None:
    if answer.endswith('"Rome"'):
        assert "is no list of messages" in refusal(tmp_path, {"prompt": "q", "response": answer}).why
        return
    (example,) = examples(tmp_path, [{"prompt": "q", "response": answer}])
    assert trained(example) == [f"{answer}<|im_end|>\n"]


def test_a_list_as_python_prints_it_is_refused(tmp_path: Path) -> None:
    for row in ({"messages": str(ASKED)}, {"chosen": str(ASKED), "rejected": str(OTHER)}):
        error = refusal(tmp_path, row)
        assert "is a list as Python prints it, not JSON" in error.why
        assert "by json.dumps" in error.fix


def test_an_answer_without_its_prompt_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, {"chosen": ASKED[1:], "rejected": OTHER[1:]})
    assert "chosen begins with the assistant's turn, and no column holds its prompt" in error.why


FOUR = [user("q"), assistant("bad"), user("r"), assistant("good")]


@pytest.mark.parametrize("template", ["marked", "unmarked"])
@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_turn_marked_as_not_to_be_trained_is_left_out(
    mark: dict[str, Any], train_on: str, template: str, tmp_path: Path
) -> None:
    name = "chatml"
    if template == "unmarked":
        source = builtin_template("chatml").replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
        (tmp_path / "unmarked.jinja").write_text(source)
        name = str(tmp_path / "unmarked.jinja")
    messages = [FOUR[0], FOUR[1] | mark, *FOUR[2:]]
    plain, marked = examples(
        tmp_path, [{"messages": FOUR}, {"messages": messages}], train_on=train_on, chat_template=name
    )
    assert marked.text == plain.text
    assert "bad" in "".join(trained(plain))
    assert "bad" not in "".join(trained(marked))
    assert "".join(trained(plain)).replace("bad<|im_end|>\n", "") == "".join(trained(marked))


def test_marks_of_sharegpt_and_turns_that_are_trained_anyway(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q", "train": False}, {"from": "gpt", "value": "bad", "weight": 0}]
    turns += [{"from": "human", "value": "r"}, {"from": "gpt", "value": "good", "weight": 1, "train": True}]
    (example,) = examples(tmp_path, [{"conversations": turns}])
    assert trained(example) == ["good<|im_end|>\n"]


@pytest.mark.parametrize(
    ("messages", "options", "why"),
    [
        ([user("q"), assistant("a", weight=2)], {}, "messages[1].weight takes 0 or 1, true or false, and is 2"),
        ([user("q"), assistant("a", train="no")], {}, "messages[1].train takes 0 or 1, true or false, and is 'no'"),
        ([user("q"), assistant("a", weight=0)], {}, "has no assistant turn to train on: all are marked"),
        ([*FOUR[:3], assistant("x", weight=0)], {"train_on": "last"}, "the last one is marked not to be trained"),
        ([user("q"), assistant("a", weight=1, train=False)], {}, "says both that it is trained and that it is not"),
        ([user("q") | {"train": True}, assistant("a")], {}, "turn 1 (user) is marked to be trained"),
        ([user("q") | {"train": False}, assistant("a")], {"train_on": "all"}, "turn 1 (user) is marked not"),
        ([user("q"), assistant("a", train_detail=[{"begin": 0}])], {}, "messages[1].train_detail marks parts"),
    ],
)  # fmt: skip
def test_marks_that_cannot_be_followed_are_refused(
    messages: list[dict[str, Any]], options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    assert why in refusal(tmp_path, {"messages": messages}, **options).why


def test_marks_in_the_answers_of_a_preference_are_refused(tmp_path: Path) -> None:
    prompt = [user("p"), assistant("x", weight=0), user("q")]
    row = {"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]}
    (pair,) = examples(tmp_path, [row])
    assert trained(pair.chosen) == ["a<|im_end|>\n"]
    assert "a preference is about whole answers" in refusal(tmp_path, row | {"chosen": [assistant("a", weight=0)]}).why


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ],
)
def test_preferences_show_the_tools(row: dict[str, Any], tmp_path: Path, with_tools: str) -> None:
    (pair,) = examples(tmp_path, [row | {"tools": TOOLS}], chat_template=with_tools)
    assert pair.prompt.text == f"{json.dumps(TOOLS[0])}[user]q[assistant]"
    assert (trained(pair.chosen), trained(pair.rejected)) == (["a"], ["b"])


@pytest.mark.parametrize("row", [{"prompt": "q", "response": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}])
def test_what_cannot_be_written_without_a_template_is_refused_or_joined(row: dict[str, Any], tmp_path: Path) -> None:
    (example,) = examples(tmp_path, [row | {"system": "S"}], chat_template="none")
    first = example.chosen if isinstance(example, PreferencePair) else example
    assert first.text == "S\n\nqa"
    error = refusal(tmp_path, row | {"tools": TOOLS}, chat_template="none")
    assert "has tools, and there is no chat template that writes them" in error.why


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Köln", "days": 2}'}}
CALLS = [user("q"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
WRITTEN = 'weather={"town": "Köln", "days": 2}'


@pytest.mark.parametrize(
    "write",
    [
        "{{ call.arguments | tojson }}",
        "{{ call.arguments }}",
        "{{ call.arguments | string }}",
        "{{ '' ~ call.arguments }}",
        "{{ '' + call.arguments + '' }}",
        "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}",
        "{ {%- for name, value in call.arguments | items %}{{ name | tojson }}: {{ value | tojson }}"
        "{%- if not loop.last %}, {% endif %}{% endfor %} }",
    ],
)
@pytest.mark.parametrize("as_text", [True, False])
def test_arguments_of_tool_calls_are_written_once_by_every_kind_of_template(
    write: str, as_text: bool, tmp_path: Path
) -> None:
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set call = c.function %}{{ call.name }}="
    (tmp_path / "calls.jinja").write_text(f"{source}{write}{{% endfor %}}{{% endfor %}}")
    function = CALL["function"] if as_text else {"name": "weather", "arguments": {"town": "Köln", "days": 2}}
    messages = [CALLS[0], CALLS[1] | {"tool_calls": [CALL | {"function": function}]}]
    row = {"messages": messages}
    (example,) = examples(tmp_path, [row], chat_template=str(tmp_path / "calls.jinja"), train_on="all")
    assert example.text.replace("{ ", "{").replace(" }", "}") == WRITTEN


def test_arguments_that_are_no_object_are_refused(tmp_path: Path, with_tools: str) -> None:
    for arguments, why in (("{town", "arguments is no JSON"), ("[1]", "arguments takes a JSON object, and is a list")):
        call = CALL | {"function": {"name": "weather", "arguments": arguments}}
        row = {"messages": [CALLS[0], CALLS[1] | {"tool_calls": [call]}]}
        error = refusal(tmp_path, row, chat_template=with_tools)
        assert f"messages[1].tool_calls[0].function.{why}" in error.why


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama3", "plain", "zephyr"])
def test_a_template_that_writes_no_tools_says_so(name: str, tmp_path: Path) -> None:
    for row, what in (({"messages": CALLS}, "tool calls"), ({"messages": ASKED, "tools": TOOLS}, "tools")):
        error = refusal(tmp_path, row, chat_template=name)
        assert f"has {what}, and the chat template {name} writes none" in error.why


def test_the_template_that_stands_in_writes_every_conversation() -> None:
    messages = [{"role": "system", "content": "s"}, *CALLS, {"role": "tool", "content": "5"}, assistant("a")]
    text = stand_in_template().render_example(messages, tools=TOOLS, train_on="assistant").text
    assert "weather" in text
    with pytest.raises(TemplateFailed):
        ChatTemplate(builtin_template("gemma")).render(messages)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_labels_of_good_and_bad_responses_are_refused(name: str, ending: str, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", name: number % 2 == 1} for number in range(4)]
    with pytest.raises(ConfigError) as refused:
        examples(tmp_path, rows, ending)
    assert f"{name}=false, which tells good responses from bad ones" in refused.value.why
    assert f"keep the rows whose {name} is true, and remove the column {name}" in refused.value.fix
    assert len(examples(tmp_path, [{"prompt": "q", "completion": "a", name: "x"}], ending)) == 1


def test_a_label_that_the_first_rows_lack_is_refused(tmp_path: Path) -> None:
    row = {"messages": ASKED}
    with pytest.raises(ConfigError, match=r"line 1,031 of .* has label=false"):
        examples(tmp_path, [row] * 1030 + [row | {"label": False}])


@pytest.mark.parametrize(
    ("history", "before"),
    [
        ([["x", "y"]], EARLIER),
        ('[["x", "y"]]', EARLIER),
        ([user("x"), assistant("y")], EARLIER),
        ([], ""),
        (None, ""),
    ],
)
def test_a_history_stands_before_the_prompt(history: Any, before: str, tmp_path: Path) -> None:
    for row in ({"instruction": "q", "output": "a"}, {"prompt": "q", "response": "a"}):
        (example,) = examples(tmp_path, [row | {"history": history}])
        assert example.text == before + PROMPT + "a<|im_end|>\n"
    assert "history takes pairs" in refusal(tmp_path, {"prompt": "q", "response": "a", "history": [["x"]]}).why


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    row = {"context": "c", "question": "q", "answer": "a", "id": 1}
    for ending in ("jsonl", "csv", "parquet"):
        (source,) = AutoData(path=str(written(tmp_path, [row], ending))).sources()
        assert source.describe(None).endswith(", columns not used: context, id")
    (source,) = AutoData(
        path=str(written(tmp_path, [row | {f"c{number}": 1 for number in range(30)}], "jsonl"))
    ).sources()
    assert source.describe(None).endswith(", c9 and 20 more")


def test_a_preference_of_which_one_answer_begins_the_other_is_read(tmp_path: Path) -> None:
    row = {"chosen": "Human: hi Assistant: yes", "rejected": "Human: hi Assistant: yes sir"}
    (pair,) = examples(tmp_path, [row])
    assert (pair.prompt.text, trained(pair.chosen), trained(pair.rejected)) == (
        "Human: hi Assistant: ",
        ["yes"],
        ["yes sir"],
    )
    error = refusal(tmp_path, {"chosen": "Human: hi Assistant:", "rejected": "Human: hi Assistant: yes"})
    assert "chosen has no text beyond the prompt" in error.why


@pytest.mark.parametrize(
    ("row", "options", "fix"),
    [
        ({"Prompt": "q", "Response": "a"}, {}, "set data.prompt_column=Prompt data.response_column=Response"),
        ({"input": "q", "output": "a"}, {}, "set data.prompt_column=input data.response_column=output"),
        ({"instruction": "q", "response": "a"}, {}, "set data.prompt_column=instruction data.response_column=response"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt_column": "chosen"}, "name another column"),
    ],
)
def test_columns_that_are_nearly_known_or_named_twice(
    row: dict[str, Any], options: dict[str, Any], fix: str, tmp_path: Path
) -> None:
    assert fix in refusal(tmp_path, row, **options).fix


def test_a_column_of_text_that_holds_conversations_is_refused(tmp_path: Path) -> None:
    assert "messages takes text, and is a list" in refusal(tmp_path, {"messages": ASKED}, text_column="messages").why


def test_a_table_without_a_header_says_what_it_takes_for_one(tmp_path: Path) -> None:
    for text, fix in (("q 0,a 0\nq 1,a 1\n", "set data.text_column"), ("prompt, response\nq,a\n", "remove the spaces")):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ConfigError, match="its first line is taken as the header") as refused:
            AutoData(path=str(tmp_path / "x.csv")).sources()
        assert fix in refused.value.fix


@pytest.mark.parametrize(
    "held", [{"prompt": ["p", "q"], "response": ["a", "b"]}, {"0": {"prompt": "p", "response": "a"}}]
)
def test_the_suggested_command_writes_the_rows_of_an_object(held: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(held, indent=1))
    with pytest.raises(ConfigError) as refused:
        list(AutoData(path=str(file)).examples())
    code = shlex.split(refused.value.fix)[4]
    assert "zip(" in code if "prompt" in held else "row in found.values()" in code
    compile(code, "suggested", "exec")


def test_a_file_twice_in_a_mixture_has_two_lines(tmp_path: Path) -> None:
    file = str(written(tmp_path, [{"messages": ASKED}], "jsonl"))
    described = dict(AutoData(path=(file, file), weights=(3.0, 1.0), chat_template="chatml").describe(None))
    assert "share 75.0%" in described[f"data {file} (1)"]
    assert "share 25.0%" in described[f"data {file} (2)"]
