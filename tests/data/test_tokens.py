"""The token cache: what is in it, that it is built once, and that it serves every sequence length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from launcher.config.compose import compose
from launcher.config.data.auto import AutoData
from launcher.config.data.chat_template import builtin_template
from launcher.config.data.text import Text
from launcher.config.model.gpt2 import Gpt2
from launcher.config.model.hf import Hf
from launcher.data.corpus import read_corpus
from launcher.data.dataset import open_splits, open_stream
from launcher.data.example_encoding import example_folders
from launcher.data.token_cache import given_tokenizer, save_tokenizer, token_folder, train_bpe
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.inference.tokenizer import load_text_tokenizer, open_tokenizer
from launcher.models.tokenizer import load_tokenizer
from launcher.utils.files import read_json, write_json

MakeText = Callable[..., Text]


def quiet() -> None:
    """Ignore the heartbeat."""


def test_the_stream_is_the_text_with_an_end_after_each_document(text: MakeText, model: Gpt2) -> None:
    documents = ("First document.\nIt has two lines.", "Zweites Dokument: 文字 und ä.\n", "x" * 200_000)
    folder, tokenizer = token_folder(text(*documents), model, heartbeat=quiet)
    stream = open_stream(folder)
    ids = stream.read(0, len(stream))
    assert (ids == tokenizer.end_id).sum() == 3
    ends = np.flatnonzero(ids == tokenizer.end_id)
    for document, part in zip(documents, np.split(ids, ends + 1)[:3], strict=True):
        assert tokenizer.decode(part[:-1].tolist()) == document


def test_datasets_reads_the_same_tokens(text: MakeText, model: Gpt2) -> None:
    import datasets

    folder, _ = token_folder(text(), model, heartbeat=quiet)
    stream = open_stream(folder)
    table = datasets.Dataset.from_file(str(folder / "tokens.arrow"))
    assert [token for row in table["tokens"] for token in row] == stream.read(0, len(stream)).tolist()


def test_segments_join_without_a_seam(text: MakeText, model: Gpt2, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_stream(token_folder(text(), model, heartbeat=quiet)[0])
    monkeypatch.setattr("launcher.data.token_cache._ROWS_AT_ONCE", 1)
    monkeypatch.setattr("launcher.data.token_cache._PIECES_AT_ONCE", 1)
    monkeypatch.setattr("launcher.config.data.files._PIECE_BYTES", 64)
    data = text(cache=text().cache + "2")
    cut = open_stream(token_folder(data, model, heartbeat=quiet)[0])
    assert len(cut._segments) > 50
    assert cut.read(0, len(cut)).tolist() == [t for s in cut._segments for t in s.tolist()]
    for start in range(0, len(cut) - 7, 3):
        assert cut.read(start, start + 7).tolist() == cut.read(0, len(cut))[start : start + 7].tolist()
    assert abs(len(cut) - len(whole)) < 20, "cutting at line ends hardly changes the tokens"


def test_four_processes_build_it_once(text: MakeText, tmp_path: Path) -> None:
    script = (
        "import sys; from launcher.data.dataset import open_splits; from launcher.config.data.text import Text\n"
        "from launcher.data import token_cache as tokens; from launcher.config.model.gpt2 import Gpt2\n"
        "model = Gpt2(name='small', num_hidden_layers=1, num_attention_heads=2, hidden_size=8,\n"
        "    max_position_embeddings=64, vocab_size=400)\n"
        "train = tokens.train_bpe\n"
        "tokens.train_bpe = lambda *a, **k: print('built') or train(*a, **k)\n"
        "data = Text(path=sys.argv[1], vocab_size=300, cache=sys.argv[2])\n"
        "splits = open_splits(data, model, sequence_length=16, seed=0)\n"
        "print(splits.train.num_sequences, splits.train.sequence(3).sum(), splits.baselines)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    data = text()
    command = [sys.executable, "-c", script, str(data.path), str(tmp_path / "shared")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert all(process.returncode == 0 for process in started)
    assert sum(lines[0] == "built" for lines in printed) == 1
    assert len({lines[-2] for lines in printed}) == 1
    assert sum(lines[-1] == "[]" for lines in printed) == 3, "opening a finished cache imports nothing heavy"
    assert len([path for path in (tmp_path / "shared").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("name", ["tokens.arrow", "stream.json", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5, None])
def test_a_damaged_cache_is_built_anew(
    text: MakeText, model: Gpt2, name: str, keep: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tokenizer = token_folder(text(), model, heartbeat=quiet)
    whole = open_stream(folder)
    ids = whole.read(0, len(whole)).tolist()
    if keep is None:
        (folder / name).unlink()
    else:
        os.truncate(folder / name, int((folder / name).stat().st_size * keep))
    again, same = token_folder(text(), model, heartbeat=quiet)
    stream = open_stream(again)
    assert (again, stream.read(0, len(stream)).tolist()) == (folder, ids)
    assert same.to_json() == tokenizer.to_json()
    assert f"{folder} is damaged; it is rebuilt" in capsys.readouterr().out
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


@pytest.mark.parametrize("name", ["tokens.arrow", "tokenizer.json"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_a_flipped_bit_in_the_cache_is_noticed(
    text: MakeText, model: Gpt2, name: str, place: float, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = token_folder(text(), model, heartbeat=quiet)
    written = (folder / name).read_bytes()
    content = bytearray(written)
    content[int(len(content) * place)] ^= 1
    (folder / name).write_bytes(content)
    again, _ = token_folder(text(), model, heartbeat=quiet)
    assert f"{folder} is damaged; it is rebuilt" in capsys.readouterr().out
    assert (again / name).read_bytes() == written
    token_folder(text(), model, heartbeat=quiet)
    assert "damaged" not in capsys.readouterr().out


def test_one_cache_serves_every_length_and_split(text: MakeText, model: Gpt2) -> None:
    data = text()
    short = open_splits(data, model, sequence_length=10, seed=0)
    long = open_splits(text(held_out=0.3), model, sequence_length=20, seed=0)
    assert len([path for path in data.cache_folder.iterdir() if path.is_dir()]) == 1
    assert np.array_equal(np.r_[short.train.sequence(0)[:-1], short.train.sequence(1)], long.train.sequence(0))
    assert short.train.sequence(0).shape == (11,)
    assert short.train.sequence(0).dtype == np.int64
    assert long.held_out.num_sequences > 2.5 * short.held_out.num_sequences


def test_held_out_text_is_the_end_and_never_trained_on(text: MakeText, model: Gpt2) -> None:
    splits = open_splits(text("seen\n" * 900, "kept\n" * 100, held_out=0.09), model, sequence_length=8, seed=0)
    assert splits.tokenizer is not None

    def words(part: str) -> set[str]:
        sequences = getattr(splits, part)
        ids = [token for i in range(sequences.num_sequences) for token in sequences.sequence(i).tolist()]
        return set(splits.tokenizer.decode(ids).split()) if splits.tokenizer else set()

    assert "kept" in words("held_out")
    assert words("held_out") <= {"kept", "ept", "pt", "t"}
    assert "seen" in words("train")


def test_other_text_or_another_vocabulary_is_another_cache(text: MakeText, model: Gpt2) -> None:
    first, *others = (
        token_folder(text(content, vocab_size=size), model, heartbeat=quiet)[0]
        for content, size in (("one text\n" * 99, 300), ("two texts\n" * 99, 300), ("one text\n" * 99, 290))
    )
    assert len({first, *others}) == 3
    assert token_folder(text("one text\n" * 99), model, heartbeat=quiet)[0] == first


def test_the_trained_tokenizer_is_the_same_every_time(text: MakeText, tmp_path: Path) -> None:
    script = (
        "import sys; from launcher.data.token_cache import train_bpe; from launcher.config.data.text import Text\n"
        "from launcher.data.corpus import read_corpus\n"
        "print(train_bpe(read_corpus(Text()), vocab_size=900).to_json())"
    )
    jsons = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert jsons == {train_bpe(read_corpus(Text()), vocab_size=900).to_json()}


def test_what_does_not_fit_is_refused_with_the_numbers(text: MakeText, model: Gpt2, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sequence_length=65: small takes at most 64 tokens; set .*=64"):
        open_splits(text(), model, sequence_length=65, seed=0)
    with pytest.raises(ConfigError, match=r"data.path: has \d+ tokens, \d+ to train on and 0 to .* takes 60 \+ 1"):
        open_splits(text("short text"), model, sequence_length=60, seed=0)
    with pytest.raises(ConfigError, match=r"data.held_out=0.001: leaves \d+ of \d+ tokens"):
        open_splits(text(held_out=0.001), model, sequence_length=60, seed=0)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(train_bpe(read_corpus(Text()), vocab_size=500).to_json())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match=r"data.tokenizer=.*: it has 500 tokens and small only 400 embedding rows"):
        open_splits(text(tokenizer=str(folder)), model, sequence_length=16, seed=0)
    with pytest.raises(EnvironmentProblem, match=r"data.tokenizer=some/tokenizer cannot be downloaded"):
        open_splits(text(tokenizer="some/tokenizer"), model, sequence_length=16, seed=0)


def test_a_tokenizer_trained_here_is_saved_as_others_load_it(text: MakeText, model: Gpt2, tmp_path: Path) -> None:
    data = text()
    tokenizer = token_folder(data, model, heartbeat=lambda: None)[1]
    save_tokenizer(data, model, tokenizer, tmp_path / "saved", heartbeat=lambda: None)
    loaded, served = load_tokenizer(tmp_path / "saved", option="x"), load_text_tokenizer(tmp_path / "saved")
    assert loaded.end_id == tokenizer.end_id == read_json(tmp_path / "saved" / "generation_config.json")["eos_token_id"]
    for ids in (tokenizer.encode("the 漢 cat"), loaded.encode("the 漢 cat"), served.encode("the 漢 cat")):
        assert tokenizer.decode(ids) == "the 漢 cat"
    assert not served.has_chat_template


def test_a_tokenizer_of_a_folder_is_saved_with_its_chat_templates(text: MakeText, model: Gpt2, tmp_path: Path) -> None:
    source, saved = tmp_path / "source", tmp_path / "saved"
    data = text()
    tokenizer = token_folder(data, model, heartbeat=lambda: None)[1]
    save_tokenizer(data, model, tokenizer, source, heartbeat=lambda: None)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ 1 }}")
    (source / "pytorch_model.bin").write_bytes(b"not a part of it")
    save_tokenizer(replace(data, tokenizer=str(source)), model, tokenizer, saved, heartbeat=lambda: None)
    copied = {file.relative_to(saved).as_posix() for file in saved.rglob("*") if file.is_file()}
    assert copied == {
        *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        *("chat_template.jinja", "additional_chat_templates/tools.jinja"),
    }
    assert load_tokenizer(saved, option="x").encode("the cat") == tokenizer.encode("the cat")


def test_the_template_that_the_data_names_is_saved_as_the_default(model: Gpt2, tmp_path: Path) -> None:
    """A loaded model renders conversations as they were rendered in training."""
    source, saved, chats = tmp_path / "source", tmp_path / "saved", tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello yourself"}]
    chats.write_text(f"{json.dumps({'messages': chat})}\n" * 40)
    data = AutoData(path=str(chats), vocab_size=257, cache=str(tmp_path / "cache"), chat_template="chatml")
    trained = example_folders(data, model, heartbeat=lambda: None).tokenizer
    trained.inner.add_special_tokens(["<|im_end|>"])
    save_tokenizer(data, model, replace(trained, chat_template=None), source, heartbeat=lambda: None)
    own = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tools", "template": "{{ 2 }}"}]
    settings = read_json(source / "tokenizer_config.json")
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": own}))

    for choice, expected in (("auto", "{{ 1 }}"), ("tools", "{{ 2 }}"), ("chatml", builtin_template("chatml"))):
        folder = saved / choice
        if choice == "auto":
            tokenizer = given_tokenizer(replace(data, tokenizer=str(source)), model, heartbeat=lambda: None)
        else:
            named = replace(data, tokenizer=str(source), chat_template=choice)
            template = named.template(source)
            tokenizer = replace(given_tokenizer(named, model, heartbeat=lambda: None), chat_template=template)
        save_tokenizer(replace(data, tokenizer=str(source)), model, tokenizer, folder, heartbeat=lambda: None)
        templates = AutoTokenizer.from_pretrained(folder).chat_template
        assert templates == {"default": expected, "tools": "{{ 2 }}"}
        ends = read_json(folder / "generation_config.json")["eos_token_id"]
        end_of_turn = trained.inner.token_to_id("<|im_end|>")
        assert ends == ([trained.end_id, end_of_turn] if choice == "chatml" else trained.end_id)


def test_the_tokenizer_of_examples_carries_a_template_that_is_not_its_own(model: Gpt2, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps({'prompt': 'Hello', 'response': 'Hi'})}\n" * 40)
    data = AutoData(path=str(rows), vocab_size=257, cache=str(tmp_path / "cache"))
    for choice, expected in (("auto", None), ("none", None), ("plain", builtin_template("plain"))):
        tokenizer = example_folders(replace(data, chat_template=choice), model, heartbeat=lambda: None).tokenizer
        assert (tokenizer.chat_template and tokenizer.chat_template.source) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"dtype": "float7"}, "float7"),
    ],
)
def test_a_config_that_keeps_the_tokenizer_from_loading_is_named(
    text: MakeText, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(train_bpe(read_corpus(Text()), vocab_size=300).to_json())
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    write_json(tmp_path / "config.json", {"model_type": "llama", "vocab_size": 300, **sizes, **changes})
    own, other = (
        Hf(name=str(tmp_path)),
        Gpt2(name="small", num_hidden_layers=1, num_attention_heads=1, hidden_size=8, weights=str(tmp_path)),
    )
    for model, option in ((own, "model.name"), (other, "model.weights")):
        expected = rf"{option}={tmp_path}: Transformers cannot read {tmp_path}/config.json: .*{said}"
        with pytest.raises(ConfigError, match=expected):
            given_tokenizer(text(tokenizer="model"), model, heartbeat=quiet)
        run = replace(compose(["backend.ranks=1"]).run, model=model)
        with pytest.raises(ConfigError, match=expected):
            open_tokenizer("model", run, heartbeat=quiet)
    with pytest.raises(ConfigError, match=rf"data.tokenizer={tmp_path}: Transformers cannot read .*{said}"):
        given_tokenizer(text(tokenizer=str(tmp_path)), own, heartbeat=quiet)
    with pytest.raises(ConfigError, match=rf"job.tokenizer={tmp_path}: Transformers cannot read .*{said}"):
        open_tokenizer(str(tmp_path), run, heartbeat=quiet)
