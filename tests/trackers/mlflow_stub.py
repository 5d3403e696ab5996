"""A stub of MLflow's REST API, in memory: what the tracker asks of a server, with its limits."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

EXPERIMENT = "7"


@dataclass
class Stub:
    """A server and what it was sent."""

    port: int
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    authorizations: set[str] = field(default_factory=set)
    experiment: str = ""

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def answer(self, path: str, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and body for one call of the API."""
        match path:
            case "experiments/get-by-name" if not self.experiment:
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no experiment"}
            case "experiments/get-by-name":
                found = {"experiment_id": EXPERIMENT, "name": self.experiment, "lifecycle_stage": "active"}
                return 200, {"experiment": found}
            case "experiments/create":
                self.experiment = given["name"]
                return 200, {"experiment_id": EXPERIMENT}
            case "runs/create":
                name = uuid.uuid4().hex  # MLflow keeps what it knows of a run in memory, by this id
                info = {"run_id": name, "run_uuid": name, "experiment_id": EXPERIMENT, "status": "RUNNING"}
                info |= {"lifecycle_stage": "active", "artifact_uri": f"mlflow-artifacts:/{name}"}
                self.runs[name] = {"info": info, "data": {"params": [], "tags": list(given["tags"])}}
                return 200, {"run": self.runs[name]}
            case "runs/get" if given["run_id"] in self.runs:
                return 200, {"run": self.runs[given["run_id"]]}
            case "runs/get":
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no run"}
            case "runs/update":
                self.runs[given["run_id"]]["info"]["status"] = given["status"]
                return 200, {"run_info": self.runs[given["run_id"]]["info"]}
            case "runs/set-tag":
                self.runs[given["run_id"]]["data"]["tags"].append({"key": given["key"], "value": given["value"]})
                return 200, {}
            case "runs/log-batch":
                params, metrics = given.get("params", []), given.get("metrics", [])
                if len(metrics) > 1000 or len(params) > 100 or any(len(each["key"]) > 250 for each in metrics):
                    return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "too much"}
                self.batches += [len(metrics)] if metrics else []
                self.metrics += metrics
                self.runs[given["run_id"]]["data"]["params"] += params
                return 200, {}
        return 501, {"error_code": "NOT_IMPLEMENTED", "message": path}


@contextmanager
def serve() -> Iterator[Stub]:
    """Serve on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            self.reply(*stub.answer(self.called, given))

        def do_POST(self) -> None:
            self.reply(*stub.answer(self.called, json.loads(self.body())))

        def do_PUT(self) -> None:
            stub.files[urlsplit(self.path).path.rpartition("/artifacts/")[2]] = self.body()
            self.reply(200, {})

        @property
        def called(self) -> str:
            return urlsplit(self.path).path.partition("/mlflow/")[2]

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def reply(self, status: int, body: dict[str, Any]) -> None:
            stub.authorizations.add(self.headers.get("Authorization", ""))
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = Stub(port=server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield stub
    server.shutdown()
    server.server_close()
    thread.join()
