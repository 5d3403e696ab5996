"""A stand-in for the Hugging Face hub: repositories of files over HTTP, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubStub:
    """What it serves and what it was asked for."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Content by repository (``datasets/org/name``) and file."""
    broken: dict[str, int] = field(default_factory=dict)
    """Bytes after which the connection of a file breaks, each time it is asked for, until removed."""
    missing: set[str] = field(default_factory=set)
    """Files that are listed and answer 404."""
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Status and ``X-Error-Code`` of the answers about a repository, in place of what it holds.

    Without a code the token is what the hub rejects.
    """
    ranges: list[tuple[str, str]] = field(default_factory=list)
    """File and ``Range`` header of each download."""
    url: str = ""


@contextmanager
def serve_hub(stub: HubStub) -> Iterator[HubStub]:
    """Serve the stub while the context lasts; its address is ``stub.url``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            if refusal := next((stub.refused[name] for name in stub.refused if f"/{name}" in path), None):
                self._fail(refusal[1], status=refusal[0])
            elif walked := re.fullmatch(r"/api/(datasets/|models/)([^/]+/[^/]+)/tree/[^/]+", path):
                self._tree(f"{walked[1]}{walked[2]}".removeprefix("models/"), with_body=with_body)
            elif listed := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(/revision/[^/]+)?", path):
                kind = "datasets/" if listed[1] == "datasets" else ""
                self._list(f"{kind}{listed[2]}", with_body=with_body)
            elif found := re.fullmatch(r"/(datasets/[^/]+/[^/]+|[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                self._file(found[1], found[2], with_body=with_body)
            else:
                self._fail("RepoNotFound")

        def _list(self, repository: str, *, with_body: bool) -> None:
            if repository not in stub.files:
                self._fail("RepoNotFound")
                return
            siblings = [{"rfilename": name} for name in stub.files[repository]]
            tree = {"id": repository.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(tree).encode(), with_body=with_body)

        def _tree(self, repository: str, *, with_body: bool) -> None:
            files = stub.files.get(repository, {}).items()
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files
            ]
            self._send(200, {"Content-Type": "application/json"}, json.dumps(entries).encode(), with_body=with_body)

        def _file(self, repository: str, name: str, *, with_body: bool) -> None:
            content = stub.files.get(repository, {}).get(name)
            if content is None or name in stub.missing:
                self._fail("EntryNotFound")
                return
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            status, start = 200, 0
            if with_body:
                given = self.headers.get("Range", "")
                stub.ranges.append((name, given))
                if asked := re.fullmatch(r"bytes=(\d+)-", given):
                    start = int(asked[1])
                    status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(status, headers, content[start:], with_body=with_body, breaks_after=stub.broken.get(name))

        def _fail(self, code: str, *, status: int = 404) -> None:
            unknown = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._send(status, {"X-Error-Code": code} if code else unknown, b"", with_body=False)

        def _send(
            self,
            status: int,
            headers: dict[str, str],
            body: bytes,
            *,
            with_body: bool,
            breaks_after: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body[:breaks_after])
                if breaks_after is not None and breaks_after < len(body):
                    self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
