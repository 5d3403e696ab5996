"""The comparison of servers: its cells, its small server in front of peers, its table."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture
def scripts(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))


def test_servers_take_turns_and_what_cannot_differ_is_measured_once(scripts) -> None:
    from serving_peers import cells

    alone, batches = "generate, one by one", "generate, batches of 8"
    found = cells(["ours", alone, batches], contexts=["mixed"], concurrency=[1, 4, 8], rounds=2)
    assert [(cell.peer, cell.concurrency, cell.round_) for cell in found[:6]] == [
        *(("ours", 1, 0), (alone, 1, 0), (batches, 1, 0)),
        *(("ours", 4, 0), ("ours", 8, 0), (batches, 8, 0)),
    ]
    assert len(found) == len({cell.name for cell in found}) == 2 * 6


def test_cells_become_a_table(scripts, tmp_path) -> None:
    figures = {"requests": 3, "client_cpu_share": 0.02, "load_average": 2.5, "errors": 0}
    figures |= {f"{name}_p{share}_s": 0.05 for name in ("ttft", "itl") for share in (50, 99)}
    speeds = {("generate, one by one", 0): 10.0, ("ours", 0): 30.0, ("ours", 1): 40.0, ("ours", 2): 90.0}
    kept = {
        "cells": {
            f"{name} | mixed | 8 | {round_}": {**figures, "tokens_per_s": v} for (name, round_), v in speeds.items()
        },
        "machine": ["2026-01-01 00:00 UTC, revision abc\nsome processor"],
        "versions": {"ours": "torch 2.13.0"},
        "troubles": {"CTranslate2 int8, batches of 16": "no such file"},
    }
    kept["cells"]["ours | mixed | 8 | 2"]["errors"] = 4
    (tmp_path / "cells.json").write_text(json.dumps(kept))
    script = REPOSITORY / "scripts" / "bench" / "serving_peers.py"
    command = [sys.executable, script, "--peers", tmp_path, "--out", tmp_path / "cells.json", "--table"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| ours | 40.0 (4.00 ×) [30 to 90] 4 errors |" in text
    assert "| generate, one by one | 10.0 (1.00 ×) |" in text
    assert "| ours | 0.05 / 0.05; 50 / 50 |" in text
    assert "CTranslate2 int8, batches of 16 did not start: no such file" in text
    assert "- load generator: 2.0% of a core, at most 2.0%" in text


def test_the_small_server_gives_each_request_its_own_tokens_and_length(scripts) -> None:
    import asyncio
    import queue
    import threading

    from peer_server import Job, answer, serve_jobs

    from launcher.benchmarks.load_client import ConnectionPool, LoadTarget, RequestOutcome, send_request
    from launcher.config.benchmark.serving import LoadRequest, parse_server_address

    batches: list[int] = []

    class Letters:
        def __call__(self, text: str) -> dict[str, list[str]]:
            return {"input_ids": list(text)}

        def decode(self, ids: list[int]) -> str:
            return chr(ids[0])

    class Peer:
        tokenizer = Letters()

        def run(self, jobs: list[Job]) -> None:
            batches.append(len(jobs))
            for _ in range(max(job.max_tokens for job in jobs)):
                for job in jobs:
                    job.give(ord(job.prompt[job.made % len(job.prompt)]))

    async def ask() -> list[RequestOutcome]:
        jobs: queue.Queue[Job] = queue.Queue()
        peer = Peer()
        threading.Thread(target=serve_jobs, args=(peer, jobs), kwargs={"batch": 3}, daemon=True).start()
        server = await asyncio.start_server(lambda r, w: answer(r, w, peer, jobs), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        pool = ConnectionPool(
            LoadTarget(address=parse_server_address(f"http://127.0.0.1:{port}"), model="m", keep_text=True)
        )
        calls = [
            LoadRequest({"prompt": text, "max_tokens": count})
            for text, count in (("ab", 3), ("xyz", 7), ("q", 1), ("w", 2))
        ]
        outcomes = [send_request(call, RequestOutcome(n, due_s=0.0), pool, start=0.0) for n, call in enumerate(calls)]
        found = await asyncio.gather(*outcomes)
        pool.close()
        server.close()
        await asyncio.sleep(0.05)
        return found

    found = asyncio.run(ask())
    assert [outcome.text for outcome in found] == ["aba", "xyzxyzx", "q", "ww"]
    assert [outcome.tokens for outcome in found] == [3, 7, 1, 2]
    assert sum(batches) == 4
    assert max(batches) <= 3
