"""What a plan says of its data, and what it refuses before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config.compose import compose
from launcher.config.data.auto import AutoData
from launcher.config.data.bpe import train_byte_level_bpe
from launcher.errors import ConfigErrors
from launcher.execution.prepare import prepare

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
WORDS = ["data=auto", "data.chat_template=chatml", "model=gpt2_tiny", "backend.ranks=1", "parallel=single"]


def written(folder: Path, *rows: Any, name: str = "x.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def details(*words: str) -> dict[str, str]:
    return prepare(compose([*WORDS, *words])).plan.details


def refused(*words: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        details(*words)
    return [str(error) for error in caught.value.errors]


def test_a_plan_shows_shape_columns_rows_and_the_first_example(tmp_path: Path) -> None:
    found = details(f"data.path={written(tmp_path, {'messages': ASKED}, {'messages': ASKED})}")
    assert found["data"] == "2 rows of conversations (messages), loss on assistant turns"
    unknown = "<|im_end|>, which ends turns, is no token of this tokenizer, so answers do not end there"
    assert found["chat template"] == f"chatml; {unknown}"
    assert found["first example"] == r"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>\n⟧"


def test_a_plan_shows_the_shares_of_a_mixture_and_what_is_evaluated(tmp_path: Path) -> None:
    chat = written(tmp_path, {"messages": ASKED})
    pairs = written(tmp_path, {"prompt": "q", "response": "a"}, name="y.jsonl")
    found = details(f"data.path=[{chat},{pairs}]", "data.weights=[3,1]", f"data.eval_path={pairs}")
    assert found[f"data {chat}"].endswith("share 75.0%")
    assert found[f"data {pairs}"].startswith("1 row of prompt and response (prompt, response), loss on assistant turns")
    assert found[f"data {pairs}"].endswith("share 25.0%")
    assert found["evaluated on"].startswith("1 row of prompt and response")


def test_plain_text_adds_nothing(tmp_path: Path) -> None:
    assert not details("data.chat_template=auto").keys() & {"data", "chat template", "first example"}


def test_a_template_that_ends_turns_with_a_token_adds_nothing(tmp_path: Path) -> None:
    found = details(f"data.path={written(tmp_path, *[{'messages': ASKED}] * 2)}", "data.chat_template=plain")
    assert found["chat template"] == "plain"


def test_nothing_is_said_of_the_tokens_of_a_tokenizer_that_is_not_here(tmp_path: Path) -> None:
    data = compose(
        [*WORDS, f"data.path={written(tmp_path, *[{'messages': ASKED}] * 2)}", "data.tokenizer=model"]
    ).run.data
    assert isinstance(data, AutoData)
    assert dict(data.describe(None))["chat template"] == "chatml"


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("chats.jsonl", "more.jsonl", "training_notes.jsonl"):
        written(tmp_path, *[{"messages": ASKED}] * 2, name=name)
    found = details(f"data.path={tmp_path}")
    assert "2 files of the folder left out (chats.jsonl, more.jsonl)" in found["data"]


def test_one_example_cannot_be_trained_on_and_held_out(tmp_path: Path) -> None:
    file = written(tmp_path, {"messages": ASKED})
    (said,) = refused(f"data.path={file}")
    assert said.startswith(f"data.held_out=0.05: {file} has one example, which leaves none to evaluate on")
    assert "data" in details(f"data.path={file}", f"data.eval_path={file}")


def test_a_prompt_without_a_template_is_shown_as_it_stands(tmp_path: Path) -> None:
    file = written(tmp_path, *[{"prompt": "q", "response": "a"}] * 2)
    found = details(f"data.path={file}", "data.chat_template=auto")
    assert found["chat template"] == "none: prompts and responses as they stand"
    assert found["first example"] == "q⟦a⟧"


def test_rows_beyond_the_first_are_checked_too(tmp_path: Path) -> None:
    file = written(tmp_path, *[{"messages": ASKED}] * 1500, {"messages": []})
    (said,) = refused(f"data.path={file}")
    assert said.startswith(
        f"data.path: line 1,501 of {file} messages is empty; correct it, or set data.on_bad_row=skip"
    )


def test_conversations_need_a_template(tmp_path: Path) -> None:
    file = written(tmp_path, {"messages": ASKED})
    (said,) = refused(f"data.path={file}", "data.chat_template=auto")
    assert said.endswith("the tokenizer has no chat template; set data.chat_template=chatml, or a Jinja file")
    (said,) = refused(f"data.path={file}", "data.chat_template=chatlm")
    assert said.startswith("data.chat_template=chatlm: is neither a file nor a known template")
    assert "chatml" in said
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}")
    (said,) = refused(f"data.path={file}", f"data.chat_template={template}")
    assert "is no valid Jinja: line 1:" in said
    template.write_text("{{ raise_exception('only Tuesdays') }}")
    (said,) = refused(f"data.path={file}", f"data.chat_template={template}")
    assert f"line 1 of {file} is refused by the chat template {template}: only Tuesdays" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.weights=[1]"], "has 1 weight, and data.path names 2"),
        (["data.weights=[0,0]"], "the weights sum to 0"),
        (["data.weights=[1,0]"], "has weight 0; leave it out of data.path"),
        (["data.weights=[1,-1]"], "a weight must be 0 or more"),
    ],
)
def test_weights_are_checked(words: list[str], said: str, tmp_path: Path) -> None:
    files = [written(tmp_path, {"messages": ASKED}, name=name) for name in ("a.jsonl", "b.jsonl")]
    assert any(said in one for one in refused(f"data.path=[{files[0]},{files[1]}]", *words))


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_a_plan_says_what_is_trained_on_preferences(tmp_path: Path) -> None:
    pairs = written(tmp_path, *[PAIR] * 20)
    said = details(f"data.path={pairs}", "job.dpo_beta=0.2")
    assert said["objective"] == "dpo, beta 0.2"
    assert said["reference"].startswith("the weights before the first step, computed for all pairs")
    assert said["rows"] == "8 pairs of a micro-batch are 16"
    assert said["first example"].endswith(r"rejected: ⟦b<|im_end|>\n⟧")
    said = details(f"data.path={pairs}", "job.objective=dpo", "adapter=lora")
    assert said["reference"].startswith("the model without its adapter, computed")
    assert "objective" not in details(f"data.path={written(tmp_path, *[{'messages': ASKED}] * 2)}")


@pytest.mark.parametrize(
    ("row", "words", "said"),
    [
        (PAIR, ["job.objective=sft"], "job.objective=sft: the data holds chosen and rejected answers"),
        (PAIR, ["job.objective=next_token"], "job.objective=next_token: the data holds chosen and rejected answers"),
        (PAIR, ["job=evaluate"], "holds chosen and rejected answers, and job=evaluate takes single answers"),
        (PAIR, ["data.packing=true"], "data.packing=true: the data is preferences"),
        (PAIR, ["data.train_on=all"], "data.train_on=all: the data is preferences"),
        (PAIR, ["parallel=pipeline", "backend.ranks=2"], "parallel=pipeline: the data is preferences"),
        (PAIR, ["parallel=deepspeed_pipeline", "backend.ranks=2"], "parallel=deepspeed_pipeline: the data is"),
        (
            PAIR,
            ["parallel=fsdp", "parallel.sequence_parallel=2", "backend.ranks=2"],
            "parallel.sequence_parallel=2: the data is preferences",
        ),
        (PAIR, ["job.dpo_beta=0"], "job.dpo_beta=0 (command line): must be above 0"),
        (PAIR, ["job.dpo_label_smoothing=0.5"], "job.dpo_label_smoothing=0.5 (command line): must be from 0 to"),
        ({"messages": ASKED}, ["job.objective=dpo"], "job.objective=dpo: the data holds conversations, no preferences"),
        ({"messages": ASKED}, ["job.dpo_beta=0.2"], "job.dpo_beta=0.2: the data holds conversations, no preferences"),
        (
            {"messages": ASKED},
            ["job.objective=next_token"],
            "job.objective=next_token: the data holds conversations, and data.train_on=assistant leaves tokens out",
        ),
        ({"text": "q"}, ["job.objective=sft", "data.chat_template=auto"], "job.objective=sft: the data holds text"),
    ],
)
def test_objectives_that_contradict_the_data_are_refused(
    row: dict[str, Any], words: list[str], said: str, tmp_path: Path
) -> None:
    file = written(tmp_path, *[row] * 40)
    assert any(said in one for one in refused(f"data.path={file}", *words)), refused(f"data.path={file}", *words)


def test_text_has_no_answers() -> None:
    with pytest.raises(ConfigErrors, match=r"job\.objective=dpo: data=text holds no answers"):
        prepare(compose(["data=text", "model=gpt2_tiny", "backend.ranks=1", "job.objective=dpo"]))


def test_a_next_token_objective_takes_conversations_whose_tokens_all_count(tmp_path: Path) -> None:
    file = written(tmp_path, *[{"messages": ASKED}] * 40)
    assert details(f"data.path={file}", "job.objective=next_token", "data.train_on=all")


def test_preferences_and_conversations_do_not_mix(tmp_path: Path) -> None:
    chat = written(tmp_path, {"messages": ASKED})
    pairs = written(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"}, name="y.jsonl")
    assert any("holds preferences, and" in one for one in refused(f"data.path=[{chat},{pairs}]"))


def test_long_examples_are_refused_with_the_numbers(tmp_path: Path) -> None:
    file = written(tmp_path, {"messages": ASKED}, {"messages": [ASKED[0], {"role": "assistant", "content": "a" * 90}]})
    words = [f"data.path={file}", "job.sequence_length=70"]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    train_byte_level_bpe(["x"], vocab_size=257).save(str(folder / "tokenizer.json"))
    words.append(f"data.tokenizer={folder}")
    (said,) = refused(*words)
    num_tokens = len("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n") + 90
    assert said == (
        "data.on_long=refuse: 1 of 2 examples is longer than a sequence of 70 + 1 tokens; the longest, "
        f"line 2 of {file}, has {num_tokens}; "
        f"set job.sequence_length={num_tokens - 1}, or data.on_long=truncate or drop"
    )
    assert details(*words, "data.on_long=truncate")


def test_packing_needs_a_kernel_with_a_mask(tmp_path: Path) -> None:
    path = f"data.path={written(tmp_path, {'messages': ASKED}, {'messages': ASKED})}"
    (said,) = refused(path, "data.packing=true", "attention=flash")
    assert said == (
        "data.packing=true: attention=flash takes no mask, which keeps the examples of a row apart; "
        "set attention=sdpa, or data.packing=false"
    )
    assert details(path, "attention=flash")


def test_packing_is_refused_for_recurrent_layers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    path = f"data.path={written(tmp_path, {'messages': ASKED}, {'messages': ASKED})}"
    words = ["model=hf", f"model.name={tmp_path}", "model.weights=random", "data.tokenizer=bpe", "attention=eager"]
    assert any(
        "data.packing=true: mamba has layers that carry a state" in said
        for said in refused(path, *words, "data.packing=true")
    )
