"""Messages as lines: the kinds and keys that older agents write, strict types, texts without values."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.protocol.messages import (
    TO_AGENT,
    AgentReady,
    Assignment,
    CommandExited,
    EndRanks,
    OutputLine,
    Ping,
    RankHeartbeat,
    UserNote,
)
from launcher.protocol.plan import Command, Host, HostPlan
from launcher.protocol.session_file import ProcessLocation
from launcher.protocol.wire import MalformedMessage, MessageReader, decode_message

LOCATION = ProcessLocation(machine="m", boot="b", pid_namespace=4, pid=7, started=9)
SECRET = "hf_abcdefghijklmnop"
ASSIGNMENT = Assignment(
    host=HostPlan(
        host=Host(name="n", slots=2, devices=("A", "B")), first_rank=0, agent_command=Command(argv=("torchrun",))
    ),
    run_dir="/r",
    run_id="i",
    run_hash="h",
    grace_s=5.0,
    heartbeat_timeout_s=0.0,
    env={"HF_TOKEN": SECRET, "PATH": "/caf\udce9"},
    files={"run.yaml": "a: 1\n"},
    session=LOCATION,
)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (Ping(), b'{"kind": "ping"}\n'),
        (EndRanks(signal=15, grace_s=2.5), b'{"kind": "end_ranks", "signal": 15, "grace_s": 2.5}\n'),
        (
            OutputLine(source="prepare", text="ü\udcff"),
            b'{"kind": "output_line", "source": "prepare", "text": "\\u00fc\\udcff"}\n',
        ),
        (
            AgentReady(scratch="/s", location=LOCATION, code="/c"),
            b'{"kind": "agent_ready", "scratch": "/s", "location": {"machine": "m", "boot": "b", "pid_namespace": 4, '
            b'"pid": 7, "started": 9}, "code": "/c"}\n',
        ),
        (
            CommandExited(name="x", role="prepare", time=1.0, code=None, signal=9, tail="t"),
            b'{"kind": "command_exited", "name": "x", "role": "prepare", "time": 1.0, "code": null, "signal": 9, '
            b'"tail": "t", "reason": ""}\n',
        ),
    ],
)
def test_a_message_has_the_line_of_every_version(message: Any, line: bytes) -> None:
    assert message.encode() == line
    assert decode_message(line) == message


def test_an_assignment_arrives_as_it_was_sent() -> None:
    messages, noise = MessageReader(TO_AGENT).feed(b"banner\n" + ASSIGNMENT.encode())
    assert (messages, noise) == ([ASSIGNMENT], b"banner\n")


def test_a_whole_number_is_a_number_of_seconds() -> None:
    line = b'{"kind": "rank_heartbeat", "rank": 0, "phase": "p", "step": null, "age_s": 1, "numbers": {"steps": 4}}'
    assert decode_message(line) == RankHeartbeat(rank=0, phase="p", step=None, age_s=1.0, numbers={"steps": 4.0})


@pytest.mark.parametrize(
    ("message", "change", "says"),
    [
        (ASSIGNMENT, {"env": {"HF_TOKEN": [SECRET]}}, "Expected `str`, got `array` - at `$.env[...]`"),
        (ASSIGNMENT, {"grace_s": SECRET}, "Expected `float`, got `str` - at `$.grace_s`"),
        (ASSIGNMENT, {"session": {"pid": SECRET}}, "Expected `int`, got `str` - at `$.session.pid`"),
        (UserNote(text="a"), {"more": SECRET}, "Object contains unknown field `more`"),
        (EndRanks(signal=15, grace_s=1.0), {"signal": 65}, "Expected `int` <= 64 - at `$.signal`"),
    ],
)
def test_a_malformed_message_is_explained_without_its_values(message: Any, change: dict[str, Any], says: str) -> None:
    line = json.dumps(json.loads(message.encode()) | change)
    with pytest.raises(MalformedMessage) as refused:
        decode_message(line)
    assert str(refused.value) == f"a malformed message {message.kind}: {says}"


@pytest.mark.parametrize("number", [str(2**63), str(-(2**63) - 1), "1e999", "NaN", "-Infinity"])
def test_a_number_beyond_64_bits_is_refused_wherever_it_stands(number: str) -> None:
    place = json.dumps(json.loads(ASSIGNMENT.encode())).replace('"pid": 7', f'"pid": {number}')
    with pytest.raises(MalformedMessage, match="a line that is not JSON"):
        decode_message(place)


def test_a_message_of_the_other_side_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="a message of the kind 'user_note', which that side may not send"):
        decode_message(UserNote(text="a").encode(), accepts=TO_AGENT)
