"""The job ``generate`` as real runs: any number of ranks, a killed rank, a run that makes room, another input."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from launcher.errors import EXIT_PREEMPTED, ConfigErrors
from launcher.files import read_json
from launcher.plan import Host
from launcher.render import render

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
    until = time.monotonic() + 120
    while sum(part.read_bytes().count(b"\n") for part in folder.glob("generated/*.part")) < count:
        assert time.monotonic() < until, "no answers came"
        time.sleep(0.05)


def test_one_rank_or_two_a_killed_one_or_none_the_answers_are_the_same(
    launch, launch_in_background, prompts, tmp_path
) -> None:
    words = (*ECHO, f"job.input={prompts}")
    launch(*words, "backend.ranks=1", "parallel=single", "run.dir=one").expect(0)
    expected = (tmp_path / "one" / "generated.jsonl").read_bytes()
    found = answers(tmp_path / "one" / "generated.jsonl")
    assert [answer["line"] for answer in found] == list(range(1, NUM_LINES + 1))
    assert found[0] == {
        "line": 1,
        "id": 0,
        "text": ("line 0;" * 20)[:128],
        "finish": "length",
        "prompt_tokens": 7,
        "tokens": 128,
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
    assert "job.temperature=0.5: the answers that are there were made with 0.0" in other.output
    assert [part.read_bytes() for part in sorted((tmp_path / "two" / "generated").glob("*.part"))] == kept
    launch("resume", "two", "backend.ranks=1", "job.echo_step_s=0").expect(0)
    assert (tmp_path / "two" / "generated.jsonl").read_bytes() == expected
    assert not list((tmp_path / "two" / "generated").glob("*.part"))
    assert "are in" in launch("resume", "two").expect(0).output


def test_whoever_is_asked_to_make_room_leaves_and_goes_on_later(
    launch, launch_in_background, prompts, tmp_path
) -> None:
    words = (*ECHO, f"job.input={prompts}", "backend.ranks=2", "job.output=out.jsonl")
    running = launch_in_background(*words, SLOWLY, "run.dir=asked")
    wait_for_answers(tmp_path / "asked")
    for rank in running.ranks().values():
        rank.send_signal(signal.SIGUSR1)
    assert running.wait() == EXIT_PREEMPTED
    assert read_json(tmp_path / "asked" / "result.json")["status"] == "preempted"
    launch("resume", "asked").expect(0)
    assert [answer["line"] for answer in answers(tmp_path / "out.jsonl")] == list(range(1, NUM_LINES + 1))
    refused = launch(*words, "run.dir=another").expect(2)
    assert "out.jsonl: is there already" in refused.output
    prompts.write_text('{"prompt": "another"}\n')
    refused = launch("resume", "asked").expect(2)
    assert "is another file than the one this run directory holds answers to" in refused.output


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
def test_files_that_are_missing_are_told_before_anything_starts(launch, word, message) -> None:
    assert message in launch(*ECHO, word).expect(2).output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("job.input=x.json",), r"job\.input=x\.json.*: its ending is none of .jsonl"),
        (("job.top_p=0",), r"job\.top_p=0.*: must be above 0"),
        (("job.engine=vllm",), "job.vllm_python does not say where"),
        (("job.max_tokens=0",), r"job\.max_tokens=0.*: must be at least 1"),
        (("job.stop=['']",), r"job\.stop"),
        (("parallel=tensor", "model=llama_tiny", "job.engine=transformers"), "only slots can be"),
        (("job.engine=transformers", "job.batching=static"), "knows continuous alone"),
        (("+job.temprature=1",), "did you mean temperature"),
    ],
)
def test_what_cannot_be_done_is_refused(plan_of, words, message) -> None:
    with pytest.raises(ConfigErrors, match=message):
        plan_of("job=generate", *words)


def test_the_plan_shows_model_and_files_and_nothing_of_learning(plan_of) -> None:
    text = render(plan_of("+exp=generate_smollm2", hosts=[Host(name="box", slots=2, cores=4, memory_bytes=2**34)]))
    for word in ("smollm2", "bf16", "sample (jsonl)", "generated.jsonl", "256.57 MiB"):
        assert word in text
    for word in ("optimizer=", "lr=", "sequences  ", "checkpoints/"):
        assert word not in text
