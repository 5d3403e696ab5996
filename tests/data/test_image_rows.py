"""Rows with images: where the images stand in the text, and which rows are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import image_model
import pytest

from launcher.config.compose import compose
from launcher.config.data.auto import AutoData
from launcher.config.data.chat_template import ChatTemplate, find_template
from launcher.config.data.conversations import BadRow
from launcher.config.data.examples import RenderedExample
from launcher.config.data.images import ImageLimits, ImageReader
from launcher.config.data.shapes import Columns, Renderer
from launcher.config.model.image_text import read_image_text
from launcher.config.validate import validate_overrides_used
from launcher.errors import ConfigErrors
from tests.image_rows import encoded, picture, write_image_rows, write_rows

ANSWER = {"role": "assistant", "content": "A cat."}
SMOLVLM = ChatTemplate(image_model._SMOLVLM, image_token="<image>")
PLAIN = ChatTemplate("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}", image_token="<image>")
TEXT = ChatTemplate("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}")


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


def rendered(
    folder: Path, template: ChatTemplate | None, row: dict[str, Any], shape: Any = "messages", **columns: str
) -> RenderedExample:
    named = columns or {"messages": "messages"}
    reader = ImageReader(folder=folder, limits=ImageLimits())
    found = Renderer(columns=Columns(shape=shape, **named), template=template, images=reader).example(row)
    assert isinstance(found, RenderedExample)
    return found


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "1.png"},
        {"type": "image", "image": "1.png"},
        {"type": "image", "image": {"bytes": encoded(picture(1)), "path": None}, "text": None},
        {"type": "image_url", "image_url": {"url": "1.png"}},
    ],
)
def test_parts_stand_where_they_are_and_only_the_answer_is_trained(folder: Path, part: dict[str, Any]) -> None:
    example = rendered(folder, SMOLVLM, {"messages": [user("Before ", part, " after"), ANSWER]})
    assert example.text.startswith("<|im_start|>User: Before <image> after<end_of_utterance>\nAssistant: A cat.")
    assert "".join(one.text for one in example.segments if one.is_trained).strip().startswith("A cat.")
    assert [(image.width, image.height) for image in example.images] == [(24, 16)]
    assert example.images[0].open().tobytes() == picture(1).tobytes()


def test_images_of_a_column_fill_places_in_order(folder: Path) -> None:
    """As TRL has rows (parts without content), as LLaVA and LLaMA-Factory have them (marks), and without any place."""
    images = ["1.png", "2.png"]
    image = {"type": "image"}
    for content in (
        [image, {"type": "text", "text": "A"}, image, {"type": "text", "text": "B"}],
        "<image>A<image>B",
    ):
        row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": images}
        example = rendered(folder, SMOLVLM, row)
        assert "<image>A<image>B" in example.text
        assert [one.path and one.path.name for one in example.images] == images
    row = {"messages": [{"role": "user", "content": "A"}, ANSWER], "image": "2.png"}
    assert rendered(folder, SMOLVLM, row).text.startswith("<|im_start|>User:<image>A<end_of_utterance>")


def test_a_prompt_with_an_image_is_a_turn(folder: Path) -> None:
    row = {"prompt": "What?", "response": "A cat.", "image": "1.png"}
    example = rendered(folder, SMOLVLM, row, "prompt_response", prompt="prompt", response="response")
    assert example.text.startswith("<|im_start|>User:<image>What?<end_of_utterance>")
    with pytest.raises(BadRow, match="no chat template"):
        rendered(folder, None, row, "prompt_response", prompt="prompt", response="response")


def test_a_template_of_texts_gets_tokens_in_its_texts(folder: Path) -> None:
    part = {"type": "image", "path": "1.png"}
    assert (SMOLVLM.takes_parts, PLAIN.takes_parts) == (True, False)
    example = rendered(folder, PLAIN, {"messages": [user("A", part, "B"), ANSWER]})
    assert example.text == "[user]A<image>B[assistant]A cat."


def test_rows_without_images_are_text_to_the_same_template(folder: Path) -> None:
    """SmolVLM's template would iterate over the characters of a text, and write none."""
    example = rendered(folder, SMOLVLM, {"messages": [{"role": "user", "content": "Hello"}, ANSWER]})
    assert "User: Hello<end_of_utterance>" in example.text
    assert example.images == ()


IMAGE = {"type": "image", "path": "1.png"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [user({"type": "image"}), ANSWER]}, "has 1 place .* no column images"),
        (
            {"messages": [user({"type": "image"}), ANSWER], "images": ["1.png", "2.png"]},
            "1 place .* its column images holds 2 images",
        ),
        ({"messages": [user(IMAGE), ANSWER], "images": ["1.png"]}, "0 places .* its column images holds 1 image$"),
        ({"messages": [user("no <image> here"), ANSWER]}, "1 × <image>.*0 images"),
        ({"messages": [user({"type": "image", "path": "9.png"}), ANSWER]}, "image 1 .*no file"),
        ({"messages": [user({"type": "image", "base64": "@@"}), ANSWER]}, "image 1.base64 is no valid base64"),
        ({"messages": [user({"type": "image", "base64": "abcd"}), ANSWER]}, "image 1.base64 is no image of"),
        ({"messages": [user({"type": "image", "bytes": "abcd"}), ANSWER]}, "image 1.bytes is no image of"),
        ({"messages": [user({"type": "image", "url": "http://a/b.png"}), ANSWER]}, "not fetched"),
        ({"messages": [user({"type": "video", "video": "a.mp4"}), ANSWER]}, "of type video"),
    ],
)
def test_bad_rows_are_named(folder: Path, row: dict[str, Any], words: str) -> None:
    picture(1).save(folder / "abcd", "PNG")  # a name that is base64
    with pytest.raises(BadRow, match=words):
        rendered(folder, SMOLVLM, row)


def test_preferences_and_text_models_take_no_images(folder: Path) -> None:
    with pytest.raises(BadRow, match="takes text alone"):
        rendered(folder, TEXT, {"messages": [user(IMAGE), ANSWER]})
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "images": ["1.png"]}
    with pytest.raises(BadRow, match="images beside preferences"):
        rendered(folder, TEXT, row, "preference", prompt="prompt", chosen="chosen", rejected="rejected")


def test_the_plan_shows_images_and_refuses_bad_ones(tmp_path: Path) -> None:
    image_model.write_image_model(tmp_path / "model", "idefics3")
    file = write_image_rows(tmp_path / "data")
    data = AutoData(path=str(file), tokenizer=str(tmp_path / "model"))
    shown = dict(data.describe(tmp_path / "model"))
    assert shown["images"].startswith("12 in 8 of the first 12 rows, 12 × 12 to 48 × 32 pixels, ")
    assert shown["first example"].startswith("<|im_start|>User: What is 0?<end_of_utterance>\\nAssistant")
    assert list(data.validate_length(64, tokenizer=tmp_path / "model")) == []
    small = AutoData(path=str(file), tokenizer=str(tmp_path / "model"), max_image_pixels=1000)
    (error,) = small.validate_length(64, tokenizer=tmp_path / "model")
    assert f"line 3 of {file}: image 2 " in str(error)
    assert "48 × 32 = 1,536 pixels, and an image may have 1,000; scale it down, or raise data.max_im" in str(error)
    elsewhere = AutoData(path=str(file), image_folder=str(tmp_path / "data" / "pictures"))
    (error,) = elsewhere.validate_length(64, tokenizer=tmp_path / "model")
    assert "no file" in str(error)


def test_the_plan_says_that_images_add_tokens_and_offers_no_cut(tmp_path: Path) -> None:
    image_model.write_image_model(tmp_path / "model", "idefics3")
    file = write_image_rows(tmp_path / "data")

    def refused(**options: Any) -> list[str]:
        data = AutoData(path=str(file), tokenizer=str(tmp_path / "model"), **options)
        return [str(error) for error in data.validate_length(8, tokenizer=tmp_path / "model")]

    (said,) = refused()
    assert "12 of 12 examples are longer than a sequence of 8 + 1 tokens" in said
    assert re.search(r"counted as one token; set job\.sequence_length to more than \d+ \(the first rank counts", said)
    assert said.endswith("or data.on_long=drop")
    assert "truncate" not in said
    (said,) = refused(on_long="truncate")
    assert "data.on_long=truncate: 8 of 12 examples are longer" in said
    assert "could be a part of an image" in said
    assert refused(on_long="drop") == []
    cut = AutoData(path=str(file), tokenizer=str(tmp_path / "model"), on_long="truncate")
    assert "ends the run all the same" in dict(cut.describe(tmp_path / "model"))["images"]


def test_a_text_model_is_named_before_its_missing_template(tmp_path: Path) -> None:
    data = AutoData(path=str(write_image_rows(tmp_path)), tokenizer="bpe")
    (error,) = data.validate_length(64)
    assert "line 2 of" in error.why
    assert "the model takes text alone" in error.why
    assert "Idefics3" in error.fix
    plain = write_rows(tmp_path, [{"messages": [{"role": "user", "content": "Hi"}, ANSWER]}] * 2, "plain.jsonl")
    (error,) = AutoData(path=str(plain), tokenizer="bpe").validate_length(64)
    assert "no chat template" in error.why


def test_options_of_images_have_no_effect_on_a_text_model(tmp_path: Path) -> None:
    image_model.write_image_model(tmp_path / "model", "idefics3")
    words = ["data.max_image_pixels=5", f"data.image_folder={tmp_path}", "data.max_image_bytes=9", "data.split=train"]
    found = validate_overrides_used(compose(["model=gpt2", *words]).run, words)
    assert [str(error.option) for error in found] == [word.partition("=")[0] for word in words[:3]]
    of_images = ["model=hf", f"model.name={tmp_path / 'model'}", "model.weights=random"]
    assert not list(validate_overrides_used(compose([*of_images, *words]).run, words))
    assert not list(validate_overrides_used(compose(["model=hf", "model.name=org/unknown", *words]).run, words))


def test_the_preview_shows_the_images_of_each_row(launch_in_process: Any, tmp_path: Path) -> None:
    image_model.write_image_model(tmp_path / "model", "idefics3")
    file = write_image_rows(tmp_path / "data")
    words = ("model=hf", f"model.name={tmp_path / 'model'}", "model.weights=random", f"data.path={file}", "rows=3")
    printed = launch_in_process("data", "preview", *words).expect(0).stdout
    assert "line 2 of" in printed
    assert "1 image (16 × 40), whose tokens a rank counts" in printed
    assert "2 images (12 × 12, 48 × 32)" in printed


def test_facts_of_a_folder_are_read_without_transformers(tmp_path: Path) -> None:
    for kind, token in (("idefics3", "<image>"), ("llava", "<image>"), ("qwen2_vl", "<|image_pad|>")):
        image_model.write_image_model(tmp_path / kind, kind)
        facts = read_image_text(tmp_path / kind)
        assert facts is not None
        assert (facts.family, facts.token, facts.processor) == (kind, token, tmp_path / kind)
        template = find_template("auto", tmp_path / kind)
        assert template is not None
        assert (template.image_token, template.takes_parts) == (token, True)
    assert read_image_text(tmp_path) is None


def test_the_template_of_an_old_processor_is_found(tmp_path: Path) -> None:
    image_model.write_image_model(tmp_path, "llava")
    (tmp_path / "chat_template.jinja").unlink()
    write_rows(tmp_path, [{"chat_template": "{{ messages }}"}], "chat_template.json")
    template = find_template("auto", tmp_path)
    assert template is not None
    assert template.source == "{{ messages }}"


def test_limits_and_folders_are_checked() -> None:
    with pytest.raises(ConfigErrors, match=r"data\.max_image_pixels=0"):
        AutoData(max_image_pixels=0)
    errors = [str(error) for error in AutoData(image_folder="/nowhere/at/all").validate_machine()]
    assert any("data.image_folder" in error for error in errors)
