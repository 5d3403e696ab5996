"""Exit codes in what hosts report: the session accepts each message, so no host is lost because of a code."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.protocol.messages import AgentMessage, CommandExited, RankRaised
from launcher.protocol.rank_env import exception_record_file
from launcher.protocol.rundir import RunDir
from launcher.protocol.wire import decode_message
from launcher.supervision.external_launcher import ExternalLauncherAgent
from launcher.supervision.host_ranks import HostRanks
from launcher.utils.processes import Process


@pytest.mark.parametrize(("written", "sent"), [(3, 3), (255, 255), (0, 1), (-9, 1), (256, 1), (2**40, 1)])
def test_a_record_of_an_exception_is_sent_with_a_code_that_the_session_accepts(
    plan_of: Any, tmp_path: Path, written: int, sent: int
) -> None:
    messages: list[AgentMessage] = []
    run_dir = RunDir(tmp_path)
    run_dir.logs.mkdir()
    ranks = HostRanks(plan_of("backend.ranks=1").hosts[0], run_dir=run_dir, scratch=tmp_path, emit=messages.append)
    ranks._ranks[0].process = Process(os.getpid(), 0)
    record = {"pid": os.getpid(), "time": 1.0, "code": written, "error": "E", "traceback": ""}
    exception_record_file(run_dir, 0).write_text(json.dumps(record))
    ranks.drain()
    decoded = [decode_message(message.encode()) for message in messages]
    assert [(type(each), each.code) for each in decoded if isinstance(each, RankRaised)] == [(RankRaised, sent)]


@pytest.mark.parametrize("ordered", [True, False])
def test_stacks_explain_an_exit_that_was_not_ordered(
    plan_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    """After Ctrl-C they would only show how the other ranks close."""
    run_dir, dumped = RunDir(tmp_path), list[float]()
    run_dir.logs.mkdir()
    monkeypatch.setattr(HostRanks, "dump", lambda self, *, within_s: dumped.append(within_s))
    ranks = HostRanks(plan_of("backend.ranks=2").hosts[0], run_dir=run_dir, scratch=tmp_path, emit=lambda message: None)
    if ordered:
        ranks.send(signal.SIGINT)
    ranks._report_exit(ranks._ranks[0], time=1.0, code=-signal.SIGINT)
    assert (dumped == []) == ordered


@pytest.mark.parametrize(("printed", "sent"), [("1", 1), ("255", 255), ("256", 255), ("999", 255)])
def test_a_failed_ssh_of_pdsh_is_reported_with_a_code_that_the_session_accepts(printed: str, sent: int) -> None:
    messages: list[AgentMessage] = []
    agent = ExternalLauncherAgent.__new__(ExternalLauncherAgent)
    agent._log, agent._current = io.BytesIO(), None  # type: ignore[assignment]
    agent._channel_ranks = SimpleNamespace(has_started_on=lambda host: False)  # type: ignore[assignment]
    agent._session = SimpleNamespace(send=messages.append)  # type: ignore[assignment]
    agent._write_log(f"pdsh@here: node2: ssh exited with exit code {printed}\n")
    (message,) = (decode_message(each.encode()) for each in messages)
    assert isinstance(message, CommandExited)
    assert (message.code, message.role) == (sent, "ssh node2")
