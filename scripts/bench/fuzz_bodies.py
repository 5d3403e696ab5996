"""Random and hostile bodies for a server, which must answer each, delay no other client, and not grow.

    python scripts/bench/fuzz_bodies.py --seconds 600

Starts ``job=serve`` with the engine that repeats prompts (what follows ``--`` are more overrides) and sends it bodies
from several clients: large ones and a hundred random ones in turn. Meanwhile one client asks for a control completion,
and another for /health/live every 10 ms. The exit code is 1 where an answer had a status of 500 or above, the control
completion was not as at first, an answer to /health/live took more than 100 ms in which the event loop was computing
(else the machine was busy), or the memory grew by more than 64 MB from the first third of the time to the last.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
from bodies import large_bodies, requests
from harness import describe_machine
from hypothesis import HealthCheck, Phase, given, seed, settings
from soak_server import SoakServer

WORDS = ("model=gpt2_tiny", "job.engine=echo", "job.tokenizer=bytes", "backend.ranks=1", "job.warm_up=[]")
STALL_S, PROBE_EVERY_S = 0.1, 0.01
GROWTH_BYTES = 64 << 20
_EXAMPLES = 100
"""Of one seed."""


class Client:
    """One connection that is opened again whenever the server has closed it."""

    def __init__(self, url: str) -> None:
        self._address = urllib.parse.urlsplit(url)
        self._connection = self._open()

    def _open(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._address.hostname or "", self._address.port, timeout=60)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Return status and body; status 0 where the connection ended without an answer."""
        for _ in range(2):  # the server may just have closed an idle one
            try:
                self._connection.request(method, path, body, {"content-type": "application/json"})
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                self._connection.close()
                self._connection = self._open()
        return 0, b""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Findings:
    """What has happened, from all threads."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.stalls: list[float] = []
        self.longest_s = 0.0
        self.num_slow = self.num_controls = 0
        """Answers that were late because the machine was busy, and control completions."""
        self.memory: list[int] = []


def fuzz(url: str, model: str, number: int, found: Findings, until: float) -> None:
    """Send bodies until the time is over."""
    with closing(Client(url)) as client:

        def ask(path: str, body: bytes) -> None:
            status, answer = client.ask("POST", path, body)
            found.statuses[status] += 1
            if status >= 500 or status == 0 or b'"server_error"' in answer:
                found.wrong.append(f"{path} {body[:300]!r}: {status} {answer[:300]!r}")

        round_number = 0
        while time.monotonic() < until:
            round_number += 1
            for path, body, _ in large_bodies(model).values():
                if time.monotonic() < until:
                    ask(path, body)

            @seed(number * 1_000_003 + round_number)
            @settings(
                max_examples=_EXAMPLES,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(request=requests(model))
            def send(request: tuple[str, bytes]) -> None:
                if time.monotonic() < until:
                    ask(*request)

            send()


def control(url: str, model: str, found: Findings, until: float) -> None:
    """Ask for the same completion again and again."""
    with closing(Client(url)) as client:
        body = {"model": model, "prompt": "control", "max_tokens": 20, "temperature": 0}
        while time.monotonic() < until:
            status, answer = client.ask("POST", "/v1/completions", json.dumps(body).encode())
            found.num_controls += 1
            if status != 200 or json.loads(answer)["choices"][0]["text"] != "controlcontrolcontro":
                found.wrong.append(f"control completion: {status} {answer[:300]!r}")
            time.sleep(0.05)


def probe(url: str, front: psutil.Process, found: Findings, until: float) -> None:
    """Look how long the event loop takes to answer."""
    with closing(Client(url)) as client:
        client.ask("GET", "/health/live")
        while time.monotonic() < until:
            used, began = _loop_time(front), time.monotonic()
            status, _ = client.ask("GET", "/health/live")
            took_s = time.monotonic() - began
            used_s = _loop_time(front) - used
            if status != 200:
                found.wrong.append(f"/health/live: {status}")
            if took_s > STALL_S:
                if used_s > STALL_S:
                    found.stalls.append(took_s)
                else:
                    found.num_slow += 1
            found.longest_s = max(found.longest_s, min(took_s, used_s))
            found.memory.append(front.memory_info().rss)
            time.sleep(PROBE_EVERY_S)


def _loop_time(front: psutil.Process) -> float:
    """Return the processor time in s of the event loop's thread, the main one: others tokenise meanwhile."""
    return next(thread.user_time + thread.system_time for thread in front.threads() if thread.id == front.pid)


def verdict(found: Findings) -> Iterator[str]:
    """Yield what was wrong."""
    yield from found.wrong[:20]
    if found.stalls:
        yield f"{len(found.stalls)} stalls of more than {STALL_S * 1000:.0f} ms, the longest {max(found.stalls):.3f} s"
    third = len(found.memory) // 3
    first, last = max(found.memory[:third]), max(found.memory[-third:])
    if last - first > GROWTH_BYTES:
        yield f"memory grew from {first >> 20} to {last >> 20} MB"


@contextmanager
def server(overrides: list[str]) -> Iterator[SoakServer]:
    """Serve until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        started = SoakServer([*WORDS, *overrides], replicas=1, folder=Path(folder))
        try:
            started.wait_until_ready()
            yield started
            started.terminate()
        finally:
            started.kill()


def main() -> int:
    """Fuzz, print what was found, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    given_words = parser.parse_args()
    print(describe_machine(), flush=True)
    found = Findings()
    with server(given_words.overrides) as started:
        (engine,) = started.engines()
        front = engine.parent()
        assert front is not None
        model, until = started.model(), time.monotonic() + given_words.seconds
        work = [
            threading.Thread(target=fuzz, args=(started.url, model, given_words.seed + number, found, until))
            for number in range(given_words.clients)
        ]
        work.append(threading.Thread(target=control, args=(started.url, model, found, until)))
        work.append(threading.Thread(target=probe, args=(started.url, front, found, until)))
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    wrong = list(verdict(found))
    counts = ", ".join(f"{count} × {status}" for status, count in sorted(found.statuses.items()))
    print(f"{sum(found.statuses.values())} bodies ({counts}), {found.num_controls} control completions")
    print(f"longest pause {found.longest_s * 1000:.0f} ms; {found.num_slow} answers late because the machine was busy")
    tenth = max(1, len(found.memory) // 10)
    parts = (found.memory[start : start + tenth] for start in range(0, 10 * tenth, tenth))
    print("memory by tenths of the time:", *(max(part, default=0) >> 20 for part in parts), "MB")
    print(*wrong or ["nothing was wrong"], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
