"""``launch chat`` at a terminal: lines in, streamed answers out, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.utils.system import child_environment

ECHO = ("gpt2_tiny", "model.weights=random", "job.engine=echo", "job.tokenizer=bytes", "job.temperature=0")
_LIMIT_S = 120.0


class Terminal:
    """``launch chat`` on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._pid, self._descriptor = pty.fork()
        if self._pid == 0:
            os.execve(sys.executable, [sys.executable, "-m", "launcher", "chat", *words], child_environment())
        self._shown = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def read_until(self, text: str) -> str:
        """Return what is shown up to ``text``, and forget it."""
        deadline = time.monotonic() + _LIMIT_S
        while text not in self._shown:
            assert time.monotonic() < deadline, self._shown
            try:
                data = os.read(self._descriptor, 65536)
            except OSError:
                data = b""
            assert data, self._shown
            self._shown += re.sub(r"\x1b\[\?2004[hl]\r?", "", data.decode())
        before, _, self._shown = self._shown.partition(text)
        return before + text

    def exit_code(self) -> int:
        while True:
            try:
                if not os.read(self._descriptor, 65536):
                    break
            except OSError:
                break
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._descriptor)


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    monkeypatch.chdir(tmp_path)
    opened: list[Terminal] = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal(*words))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_a_conversation(chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = chat(*ECHO, "job.max_tokens=12")
    assert "no chat template: it continues your text" in terminal.read_until("> ")
    terminal.type("abc\n")
    assert "\nabcabcabcabc (cut: " in terminal.read_until("\n> ").replace("\r", "")
    terminal.type("de\n")
    said = terminal.read_until("\n> ").replace("\r", "")
    assert "\nabcabcabcabc (cut" in said, "the text so far comes first, and echo repeats it"
    terminal.type("/reset\n")
    terminal.read_until("\n> ")
    terminal.type("de\n")
    assert "\ndededededede (cut" in terminal.read_until("\n> ").replace("\r", "")
    terminal.type("/nothing\n")
    assert "no such command: /nothing" in terminal.read_until("\n> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_ctrl_c_stops_an_answer_and_not_the_conversation(chat: Callable[..., Terminal]) -> None:
    terminal = chat(*ECHO, "job.max_tokens=200", "job.echo_step_s=0.05")
    terminal.read_until("> ")
    terminal.type("abc\n")
    terminal.read_until("abcabcabc")
    terminal.type("\x03")
    assert " (stopped)" in terminal.read_until("\n> ")
    terminal.type("half a line\x03")
    terminal.read_until("\n> ")
    terminal.type("/exit\n")
    assert terminal.exit_code() == 0


def test_what_cannot_talk_is_refused(launch_in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for words, said in {
        ("nowhere",): "run=nowhere: is not a folder, and no run in runs begins with it",
        ("empty",): "run=empty: is neither a run nor a model; name a run, a model folder, ",
        ("gpt2_tiny",): "there are no pretrained weights of this size",
        (*ECHO, "parallel=ddp", "backend.ranks=2"): "backend.ranks=2: launch chat runs one engine in one process",
        (*ECHO, "backend=deepspeed"): "backend=deepspeed: launch chat runs one engine in one process",
        (*ECHO, "job=serve"): "job=serve: launch chat runs one engine in one process",
        (*ECHO, "job.temprature=1"): "job.temprature (command line): no such option",
    }.items():
        assert said in launch_in_process("chat", *words).expect(2).stderr, words
    assert "job         generate" in launch_in_process("chat", *ECHO, "dry_run=true").expect(0).stdout
