"""A W&B server on loopback that knows just enough for a run to start, log, upload, resume and finish."""

from __future__ import annotations

import base64
import gzip
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 3
"""An API key of the right form."""


@dataclass
class StoredRun:
    """One run as the server knows it."""

    project: str = ""
    group: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None


@dataclass
class Stub:
    """The server's address and what it was sent."""

    url: str
    runs: dict[str, StoredRun] = field(default_factory=dict)
    sweep_config: str = "{}"
    """The sweep that was uploaded."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """Parameter values that an agent is still to try."""
    num_handed_out: int = 0


@contextmanager
def serve() -> Iterator[Stub]:
    """Run the server on a free port for the length of a block."""
    server = _Server(("127.0.0.1", 0), _Handler)
    stub = Stub(url=f"http://127.0.0.1:{server.server_port}")
    server.stub = stub
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    stub: Stub

    def handle_error(self, request: object, client_address: object) -> None:
        """Pass over what a killed client leaves: its threads end without a word."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        _, _, run_id, name = self.path.split("/", 3)
        self._runs[run_id].files[name] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/file_stream"):
            self._stream(self._runs[self.path.split("/")[-2]], json.loads(body))
            self._answer({"limits": {}})
        elif self.path != "/graphql":
            self._answer({})
        else:
            asked = json.loads(body)
            self._answer({"data": self._graphql(asked["query"], asked.get("variables") or {})})

    def _stream(self, run: StoredRun, sent: dict[str, Any]) -> None:
        for name, part in (sent.get("files") or {}).items():
            lines = [json.loads(line) for line in part["content"] if "output" not in name]
            if "history" in name:
                run.history[part["offset"] : part["offset"] + len(lines)] = lines
            elif "summary" in name:
                run.summary = lines[-1]
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]

    def _graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._upsert(given), "inserted": True}}
        if "createRunFiles" in query:
            run_id = given.get("run") or given["runName"]
            files = [{"name": name, "uploadUrl": f"{self._stub.url}/upload/{run_id}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}
        if "bucket(" in query:
            return {"model": self._resumable(given.get("name") or given.get("run"))}
        if "sweep" in query.lower() or "agent" in query.lower():
            return self._sweep(query, given)
        if "viewer" in query:
            viewer = {"id": "u", "entity": "stub", "username": "stub", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer, "serverInfo": {"features": [], "cliVersionInfo": {}}}
        return {"serverInfo": {"features": [], "cliVersionInfo": {}}} if "serverInfo" in query else {}

    def _sweep(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """Take a sweep, and hand its trials to an agent one after the other."""
        stub = self._stub
        project = {"name": "launcher", "entity": {"name": "stub"}}
        if "upsertSweep" in query:
            stub.sweep_config = given["config"]
            return {"upsertSweep": {"sweep": {"name": "sw1", "project": project}, "configValidationWarnings": []}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "a1"}}}
        if "agentHeartbeat" in query:
            return {"agentHeartbeat": {"agent": {"id": "a1"}, "commands": json.dumps(self._next_commands(given))}}
        sweep = {"id": "s", "name": "sw1", "method": "grid", "state": "RUNNING", "config": stub.sweep_config}
        return {"project": {"sweep": {**sweep, "runs": {"edges": []}, "createdAt": "x", "heartbeatAt": "x"}}}

    def _next_commands(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        stub = self._stub
        if json.loads(given.get("runState") or "{}"):
            return []  # one trial at a time
        if not stub.trials:
            return [{"type": "exit"}]
        stub.num_handed_out += 1
        values = {name: {"value": value} for name, value in stub.trials.pop(0).items()}
        return [{"type": "run", "run_id": f"trial{stub.num_handed_out}", "args": values, "program": "launcher"}]

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        run_id = given["name"]
        run = self._runs.setdefault(run_id, StoredRun())
        run.project, run.group = given.get("project") or run.project, given.get("groupName") or run.group
        run.job_type = given.get("jobType") or run.job_type
        run.config.update(json.loads(given.get("config") or "{}"))
        project = {"name": run.project, "entity": {"name": "stub"}}
        return {**self._identity(run_id), "displayName": run_id, "config": json.dumps(run.config), "project": project}

    def _resumable(self, run_id: str | None) -> dict[str, Any]:
        run = self._runs.get(run_id or "")
        if run is None:
            return {"bucket": None}
        counts = {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "eventsTail": "[]"}
        kept = {"summaryMetrics": json.dumps(run.summary), "config": json.dumps(run.config), "tags": []}
        more = {"wandbConfig": '{"t":1}', "createdAt": "2026-01-01T00:00:00", "stopped": False, "state": "running"}
        return {"id": "p", "name": run.project, "bucket": {**self._identity(run_id), **counts, **tails, **kept, **more}}

    @staticmethod
    def _identity(run_id: str | None) -> dict[str, Any]:
        return {"id": base64.b64encode((run_id or "").encode()).decode(), "name": run_id}

    @property
    def _stub(self) -> Stub:
        assert isinstance(self.server, _Server)
        return self.server.stub

    @property
    def _runs(self) -> dict[str, StoredRun]:
        return self._stub.runs

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while length := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep test output quiet."""
