"""The job ``generate`` as real runs: any number of ranks, a killed rank, a run that makes room, another input."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from launcher.config.job.generate import Generate
from launcher.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, ConfigError, ConfigErrors
from launcher.planning.render import render_plan
from launcher.protocol.plan import Host
from launcher.utils.files import read_json
from tests.helpers import wait_for

ECHO = ("job=generate", "job.engine=echo", "job.tokenizer=bytes", "tracker=local", "backend.threads=1")
WITH_MODEL = (
    *("job=generate", "model=gpt2_tiny", "precision=fp32", "job.tokenizer=bytes", "job.max_tokens=64"),
    *("tracker=local", "backend.threads=1"),
)
SLOWLY = "job.echo_step_s=0.01"
NUM_LINES = 300


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"line {number};", "id": number, "temperature": number % 2} for number in range(NUM_LINES)]
    lines[7] = {"promt": "typo"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_answers(folder: Path, count: int = 50) -> None:
    wait_for(lambda: sum(part.read_bytes().count(b"\n") for part in folder.glob("generated/*.part")) >= count)


def test_one_rank_or_two_a_killed_one_or_none_the_answers_are_the_same(
    launch, launch_in_background, prompts, tmp_path
) -> None:
    words = (*ECHO, f"job.input={prompts}")
    ended = launch(*words, "backend.ranks=1", "parallel=single", "run.dir=one").expect(EXIT_BAD_INPUT)
    said = f"job.input={prompts}: 1 of 300 lines is bad. "
    assert said in ended.output
    assert "First, line 8: promt: no such field; did you mean prompt?" in ended.output
    result = read_json(tmp_path / "one" / "result.json")
    assert (result["status"], result["exit_code"]) == ("failed", EXIT_BAD_INPUT)
    expected = (tmp_path / "one" / "generated.jsonl").read_bytes()
    found = answers(tmp_path / "one" / "generated.jsonl")
    assert [answer["line"] for answer in found] == list(range(1, NUM_LINES + 1))
    assert found[0] == {
        "line": 1,
        "id": 0,
        "text": ("line 0;" * 20)[:128],
        "finish_reason": "length",
        "prompt_tokens": 7,
        "completion_tokens": 128,
    }
    assert found[7] == {"line": 8, "error": "promt: no such field; did you mean prompt?"}
    metrics = read_json(tmp_path / "one" / "result.json")["metrics"]
    assert (metrics["generate/lines"], metrics["generate/errors"]) == (NUM_LINES, 1)
    assert metrics["generate/tokens"] == 128 * (NUM_LINES - 1)
    assert metrics["perf/tokens_per_s"] > 0

    running = launch_in_background(*words, SLOWLY, "backend.ranks=2", "run.dir=two")
    wait_for_answers(tmp_path / "two")
    running.ranks()[1].send_signal(signal.SIGKILL)
    assert running.wait() == 128 + signal.SIGKILL
    assert not (tmp_path / "two" / "generated.jsonl").exists()
    kept = [part.read_bytes() for part in sorted((tmp_path / "two" / "generated").glob("*.part"))]
    other = launch("resume", "two", "job.temperature=0.5").expect(2)
    assert "job.temperature=0.5: the existing answers were generated with 0.0" in other.output
    assert [part.read_bytes() for part in sorted((tmp_path / "two" / "generated").glob("*.part"))] == kept
    launch("resume", "two", "backend.ranks=1", "job.echo_step_s=0").expect(EXIT_BAD_INPUT)
    assert (tmp_path / "two" / "generated.jsonl").read_bytes() == expected
    assert not list((tmp_path / "two" / "generated").glob("*.part"))
    again = launch("resume", "two").expect(EXIT_BAD_INPUT).output
    assert "are in" in again
    assert said in again


def test_a_preempted_task_exits_and_continues_later(launch, launch_in_background, prompts, tmp_path) -> None:
    words = (*ECHO, f"job.input={prompts}", "backend.ranks=2", "job.output=out.jsonl")
    running = launch_in_background(*words, SLOWLY, "run.dir=asked")
    wait_for_answers(tmp_path / "asked")
    for rank in running.ranks().values():
        rank.send_signal(signal.SIGUSR1)
    assert running.wait() == EXIT_PREEMPTED
    assert read_json(tmp_path / "asked" / "result.json")["status"] == "preempted"
    launch("resume", "asked").expect(EXIT_BAD_INPUT)
    assert [answer["line"] for answer in answers(tmp_path / "out.jsonl")] == list(range(1, NUM_LINES + 1))
    refused = launch(*words, "run.dir=another").expect(2)
    assert "out.jsonl: already exists" in refused.output
    prompts.write_text('{"prompt": "another"}\n')
    refused = launch("resume", "asked").expect(2)
    assert "is not the file whose answers are in this run directory" in refused.output


@pytest.mark.parametrize("who", ["launcher", "agent"])
def test_a_terminated_task_keeps_its_answers_and_continues(
    launch, launch_in_background, prompts, tmp_path, who: str
) -> None:
    running = launch_in_background(*ECHO, f"job.input={prompts}", "backend.ranks=2", SLOWLY, "run.dir=ended")
    wait_for_answers(tmp_path / "ended")
    if who == "launcher":
        running.send_signal(signal.SIGTERM)
    else:
        os.kill(read_json(tmp_path / "ended" / "session.json")["agents"][0]["location"]["pid"], signal.SIGTERM)
    assert running.wait() == EXIT_PREEMPTED, running.output
    assert "launch resume" in running.output.splitlines()[-1]
    assert "Traceback" not in running.output
    assert read_json(tmp_path / "ended" / "result.json")["status"] == "preempted"
    kept = [part.read_bytes() for part in sorted((tmp_path / "ended" / "generated").glob("*.part"))]
    assert any(kept)
    assert [part.rpartition(b"\n")[2] for part in kept] == [b"", b""], "whole lines"
    launch("resume", "ended", "job.echo_step_s=0").expect(EXIT_BAD_INPUT)
    assert [answer["line"] for answer in answers(tmp_path / "ended" / "generated.jsonl")] == list(
        range(1, NUM_LINES + 1)
    )


def test_ranks_that_are_one_engine_answer_as_one_rank_does_and_make_room(
    launch, launch_in_background, tmp_path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"line {number};", "id": number}) + "\n" for number in range(300)))
    words = (*WITH_MODEL, f"job.input={path}")
    launch(*words, "backend.ranks=1", "parallel=single", "run.dir=one").expect(0)
    expected = (tmp_path / "one" / "generated.jsonl").read_bytes()
    assert len(expected.splitlines()) == 300
    running = launch_in_background(*words, "parallel=pipeline", "run.dir=two")
    wait_for_answers(tmp_path / "two", 10)
    for rank in running.ranks().values():
        rank.send_signal(signal.SIGUSR1)
    assert running.wait() == EXIT_PREEMPTED
    launch("resume", "two").expect(0)
    assert (tmp_path / "two" / "generated.jsonl").read_bytes() == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("job.input=missing.jsonl", "there is no such file"),
        ("job.output=no/such/folder.jsonl", "there is no folder"),
    ],
)
def test_missing_files_are_reported_before_anything_starts(launch, word, message) -> None:
    assert message in launch(*ECHO, word).expect(2).output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("job.top_p=0",), r"job\.top_p=0.*: must be above 0"),
        (("job.engine=vllm",), "job.vllm_python is not set"),
        (("job.max_tokens=0",), r"job\.max_tokens=0.*: must be at least 1"),
        (("job.stop=['']",), r"job\.stop"),
        (("parallel=tensor", "model=llama_tiny", "job.engine=transformers"), "only job.engine=paged supports"),
        (("job.engine=transformers", "job.batching=static"), "batches continuously only"),
        (("+job.temprature=1",), "did you mean temperature"),
    ],
)
def test_what_cannot_be_done_is_refused(plan_of, words, message) -> None:
    with pytest.raises(ConfigErrors, match=message):
        plan_of("job=generate", *words)


def refusal(path: Path, **options: str) -> str:
    """Return what the plan says against a file of prompts; empty if nothing."""
    job = Generate(input=str(path), **options)
    try:
        source = job.source()
    except ConfigError as error:
        return str(error)
    return "".join(map(str, job.validate_lines(source)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": "b"}\n',
            "line 1: text: no such field; did you mean prompt? (all 2 lines",
        ),
        ("x.jsonl", b'{"Question": "a"}\n', "line 1: Question: no such field; did you mean prompt? (its only line)"),
        ("x.jsonl", b'{"conversations": []}\n', "did you mean messages?"),
        ("x.jsonl", b'{"prompt": "a", "text": "b"}\n', "text: no such field; choose from"),
        ("x.jsonl", b'{"prompt": "a", "max_new_tokens": 3}\n', "did you mean max_tokens?"),
        ("x.jsonl", b'{"id": 1}\n', "needs prompt or messages"),
        ("x.jsonl", b'{"text": "a"}\n{"prompt": "b"}\n', ""),
        ("x.jsonl", b"plain prose\n", "ends in .jsonl and holds no JSON lines; correct it, or set job.format=text"),
        ("x.txt", b'{"prompt": "a"}\n', ""),
        ("x.json", b'{"messages": [{"role": "user", "content": "a"}]}', ""),
        ("x.csv", b"text,id\na,1\n", "its header needs a column prompt; it has text, id; did you mean prompt by text?"),
        ("x.csv", b"a\rb\r", "its lines end in a carriage return without a newline"),
        ("x.txt", b"a\rb\r", "its lines end in a carriage return without a newline"),
        ("x.json", b'{"data":\n [{"prompt": "a"}]}', "holds one JSON object and no list of rows"),
        ("x.html", b"<p>a</p>", "extract its text, or set job.format=text"),
        ("x.txt", b"%PDF-1.4", "is a PDF document"),
        ("x.jsonl", b" \n", "is empty"),
        ("x.jsonl", '{"prompt": "a"}'.encode("utf-16"), "is UTF-16, not UTF-8; convert it: iconv"),
        ("x.jsonl", b"\xff\xfe\xfd" * 99, "is UTF-16, not UTF-8"),
        ("x.jsonl", gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9], "is damaged or cut off"),
    ],
)
def test_what_the_plan_sees_in_a_file_of_prompts(tmp_path, name, content, said) -> None:
    (tmp_path / name).write_bytes(content)
    found = refusal(tmp_path / name)
    assert said in found
    assert bool(said) == bool(found)


@pytest.mark.parametrize(
    ("name", "content", "format_"),
    [
        ("x.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n'), "jsonl"),
        ("x.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n'), "auto"),
        ("x.jsonl", lzma.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n'), "jsonl"),
        ("x.txt.zst", b"", "auto"),
        ("x.json", b'[{"prompt": "a"},\n {"prompt": "b"}]', "auto"),
        ("x.json", b'["a", "b"]', "auto"),
        ("no_ending", b'{"prompt": "a"}\n{"prompt": "b"}\n', "auto"),
        ("x.tsv", b"id\tprompt\n1\ta\n2\tb\n", "auto"),
        ("x.csv", b"\xef\xbb\xbfprompt;id\r\na;1\r\nb;2\r\n", "auto"),
        ("x.txt", b"prompt\na\nb\n", "csv"),
        ("x.csv.bz2", bz2.compress(b"prompt\na\nb\n"), "csv"),
        ("x.txt", b"\xef\xbb\xbfa\r\n\r\nb", "auto"),
        ("x.md", b"a\nb\n", "auto"),
        ("x.jsonl", b"a\nb\n", "text"),
    ],
)
def test_prompts_are_read_by_content_and_ending(tmp_path, name, content, format_) -> None:
    if name.endswith(".zst"):
        with pa.output_stream(str(tmp_path / name), compression="zstd") as file:
            file.write(b"a\nb\n")
    else:
        (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name, format=format_) == ""
    records = Generate(input=str(tmp_path / name), format=format_).source().records(lambda number: True)
    assert [record.fields["prompt"] for record in records] == ["a", "b"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_prompts_are_written_as_lines_by_the_command_named(tmp_path, kind) -> None:
    path, made = tmp_path / f"x.{kind}", pa.table({"prompt": ["a", "b"]})
    if kind == "parquet":
        pyarrow.parquet.write_table(made, path)
    else:
        with pa.ipc.new_stream(str(path), made.schema) as writer:
            writer.write_table(made)
    command = shlex.split(refusal(path).partition("write JSON lines: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    assert refusal(tmp_path / "x.jsonl") == ""


def test_choices_among_tokens_that_greedy_answers_do_not_make_are_said(plan_of) -> None:
    words = ("job=generate", "job.tokenizer=bytes", "job.top_p=0.5", "job.top_k=4")
    said = "job.top_k=4 job.top_p=0.5: job.temperature=0 takes the most likely token"
    assert [line for line in plan_of(*words).warnings if line.startswith(said)]
    assert not [line for line in plan_of(*words, "job.temperature=1").warnings if "temperature" in line]


def test_the_plan_shows_model_and_files_and_nothing_of_learning(plan_of) -> None:
    text = render_plan(plan_of("+exp=generate_smollm2", hosts=[Host(name="box", slots=2, cores=4, memory_bytes=2**34)]))
    for word in ("smollm2", "bf16", "sample (jsonl)", "generated.jsonl", "256.57 MiB"):
        assert word in text
    for word in ("optimizer=", "lr=", "sequences  ", "checkpoints/"):
        assert word not in text
