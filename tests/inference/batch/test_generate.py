"""The loop of a rank, with an engine that repeats its prompts."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from launcher.config.data.rows import Record
from launcher.config.inference import EngineLimits
from launcher.errors import EXIT_PREEMPTED, JobError
from launcher.inference.batch.generate import BatchWorker
from launcher.inference.batch.output import PartIndex, PartWriter
from launcher.inference.engine.base import EngineOutput
from launcher.inference.engine.echo_engine import EchoEngine
from launcher.inference.tokenizer import byte_tokenizer

WORDS = byte_tokenizer()


class Asked:
    """Asks to make room once so many answers have been asked about."""

    def __init__(self, after: int | None = None) -> None:
        self.left = after

    def requested(self) -> bool:
        if self.left is not None:
            self.left -= 1
        return self.left is not None and self.left < 0


def echo() -> EchoEngine:
    return EchoEngine(limits=EngineLimits(max_num_seqs=4), max_model_len=64, vocab_size=300)


def work(folder, records, *, engine=None, asked=None, size=100, models=None) -> list[dict]:
    index = PartIndex(folder, size)
    index.scan()
    with PartWriter(folder / "rank0.part") as parts:
        BatchWorker(
            records=(record for record in records if record.number not in index),
            default_fields={"max_tokens": 6, "stop": ()},
            tokenizer=WORDS,
            engine=engine or echo(),
            parts=parts,
            index=index,
            preemption=asked or Asked(),
            max_concurrent=4,
            seed=0,
            models=models or {},
            heartbeat=lambda done, speed: None,
        ).run()
    lines = (folder / "rank0.part").read_bytes().splitlines()
    return sorted((json.loads(line.split(b" ", 4)[4]) for line in lines), key=lambda answer: answer["line"])


def prompts(*texts: str, **fields) -> list[Record]:
    return [Record(number, number + 1, {"prompt": text, **fields}) for number, text in enumerate(texts)]


def test_each_line_gets_its_own_answer(tmp_path) -> None:
    texts = [f"{number}-" for number in range(40)]
    found = work(tmp_path, prompts(*texts))
    assert [answer["text"] for answer in found] == [(text * 6)[:6] for text in texts]
    assert all(answer["finish_reason"] == "length" and answer["completion_tokens"] == 6 for answer in found)


def test_each_line_is_answered_by_the_adapter_that_it_names(tmp_path) -> None:
    asked = {}

    class Adapted(EchoEngine):
        adapters = ("polite",)

        def _accept(self, request) -> None:
            asked[request.id] = request.adapter
            super()._accept(request)

    engine = Adapted(limits=EngineLimits(max_num_seqs=4), max_model_len=64, vocab_size=300)
    records = [
        Record(number, number + 1, {"prompt": "ab", "model": name})
        for number, name in enumerate(("polite", "tiny", "x"))
    ]
    found = work(tmp_path, records, engine=engine, models={"tiny": "", "polite": "polite"})
    assert asked == {"0": "polite", "1": ""}
    assert "there is no model 'x'" in found[2]["error"]


def test_stop_strings_end_an_answer_over_token_borders_and_are_no_part_of_it(tmp_path) -> None:
    cancelled = []

    class Noting(EchoEngine):
        def cancel(self, request_id: str) -> None:
            cancelled.append(request_id)
            super().cancel(request_id)

    engine = Noting(limits=EngineLimits(max_num_seqs=4), max_model_len=64, vocab_size=300)
    (answer,) = work(tmp_path, prompts("abcdef", stop=["de", "zz"]), engine=engine)
    assert cancelled == ["0"]  # no client waits for the rest of it
    assert (answer["text"], answer["finish_reason"], answer["stop_reason"], answer["completion_tokens"]) == (
        "abc",
        "stop",
        "de",
        5,
    )


def test_bad_lines_are_reported_and_the_others_done(tmp_path) -> None:
    records = prompts("good", "x" * 64, "also", "")
    records += [Record(4, 5, {"id": 7, "prompt": [299, 300]}), Record(5, 6, {}, "is not a JSON object")]
    found = work(tmp_path, records)
    assert [answer.get("error", "")[:16] for answer in found] == [
        "",
        "prompt: the prom",
        "",
        "prompt: is empty",
        "prompt: 300 is n",
        "is not a JSON ob",
    ]
    assert found[4]["id"] == 7


def test_of_many_bad_lines_the_first_few_are_printed(tmp_path, capsys) -> None:
    assert len(work(tmp_path, [Record(number, number + 1, {"text": "a"}) for number in range(50)])) == 50
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "line 1: text: no such field; did you mean prompt?"
    assert printed[19:] == [
        "line 20: text: no such field; did you mean prompt?",
        "more lines are bad: only the answers say which",
    ]


def test_a_preempted_task_exits_and_continues_later(tmp_path) -> None:
    records = prompts(*(f"{number}-" for number in range(40)))
    with pytest.raises(SystemExit) as left:
        work(tmp_path, records, asked=Asked(after=20))
    assert left.value.code == EXIT_PREEMPTED
    before = (tmp_path / "rank0.part").read_bytes()
    assert 0 < before.count(b"\n") < 40
    found = work(tmp_path, records)
    assert (tmp_path / "rank0.part").read_bytes().startswith(before)
    assert [answer["line"] for answer in found] == list(range(1, 41))


def test_what_the_engine_fails_at_is_reported_and_what_it_drops_ends_the_run(tmp_path) -> None:
    class Failing(EchoEngine):
        finish = "error"

        def step(self):
            return [
                EngineOutput(request_id=name, finish_reason=self.finish, error="broken")
                for name in list(self._active)
                if self._active.pop(name)
            ]

    failing = Failing(limits=EngineLimits(max_num_seqs=4), max_model_len=64, vocab_size=300)
    (answer,) = work(tmp_path, prompts("a"), engine=failing)
    assert answer == {"line": 1, "error": "broken"}
    failing.finish = "timeout"
    with pytest.raises(JobError, match="line 2 as timeout"):
        work(tmp_path, [Record(1, 2, {"prompt": "a"})], engine=failing)


def test_lines_are_read_as_they_are_needed(tmp_path) -> None:
    """Many lines in less memory than they have."""
    records = (Record(number, number + 1, {"prompt": "x" * 50, "max_tokens": 1}) for number in range(5_000))
    tracemalloc.start()
    try:
        work(tmp_path, records, size=5_000)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 10e6  # the answers themselves, as this test reads them, are most of it
