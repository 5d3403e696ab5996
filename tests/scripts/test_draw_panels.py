"""The drawing of a dashboard's panels, from the answers of a Prometheus on loopback."""

from __future__ import annotations

import json
import sys
import threading
import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import draw_panels
import pytest

from tests.conftest import REPOSITORY

BOARD = REPOSITORY / "tests/golden/deploy/monitoring/training/grafana/dashboards/training.json"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def prometheus() -> Iterator[tuple[str, list[str]]]:
    """Answer every query with one series; the loss is not finite once, and the learning rate has no data."""
    asked: list[str] = []

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            asked.append(query["query"][0])
            begin, end = float(query["start"][0]), float(query["end"][0])
            values = [[begin, "4"], [(begin + end) / 2, "NaN"], [end, "2"]]
            result = [{"metric": {"run_id": "a<b"}, "values": values}] if "train_lr" not in asked[-1] else []
            body = json.dumps({"status": "success", "data": {"result": result}}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Api) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_every_panel_is_drawn(
    prometheus: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = prometheus
    monkeypatch.setattr(sys, "argv", ["draw_panels.py", address, str(BOARD), str(tmp_path / "panels.svg")])
    draw_panels.main()
    root = ElementTree.parse(tmp_path / "panels.svg").getroot()
    panels = json.loads(BOARD.read_text())["panels"]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    titles = [panel["title"] for panel in panels]
    assert titles == [text for text in texts if text in titles]
    assert texts.count("no data") == 1
    assert {"train_loss", "a<b"} < set(texts), "what all series of a panel begin with is left out"
    assert str(texts[-1]).endswith("not by Grafana.")
    first = next(root.iter(f"{SVG}polyline"))
    assert first.get("points") == "52.0,26.0 312.0,91.0", "not a number is no point; the axis begins at 0"
    assert len(asked) == sum(len(panel["targets"]) for panel in panels)
    assert not any("$" in query for query in asked)
