"""The HTTP API of a Prometheus that answers what a test says of each version."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs


@dataclass
class Measured:
    """What is measured of one version."""

    requests_per_s: float | None = 100.0
    failure_share: float | None = 0.0
    ttft_p95_s: float | None = 0.2
    between_tokens_s: float | None = 0.02

    def answer(self, query: str) -> float | None:
        """Return the value of a query of a gate."""
        if "histogram_quantile" in query:
            return self.ttft_p95_s
        if "inter_token" in query:
            return self.between_tokens_s
        return self.failure_share if " / " in query else self.requests_per_s


@dataclass
class PrometheusApi:
    """Answers by version, and the queries that were asked."""

    versions: dict[str, Measured] = field(default_factory=dict)
    """By a text that the queries about a version hold."""
    queries: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, query: str) -> float | None:
        """Return the value of a query; ``None`` without a series."""
        self.queries.append(query)
        if query == "vector(1)":
            return 1.0
        found = (each for text, each in self.versions.items() if text in query)
        return next(found, Measured(None, None, None, None)).answer(query)


@contextmanager
def prometheus_api() -> Iterator[PrometheusApi]:
    """Serve until the end of the block."""
    api = PrometheusApi()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            (query,) = parse_qs(body)["query"]
            value = api.answer(query)
            result = [] if value is None else [{"metric": {}, "value": [1.0, str(value)]}]
            data = json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
