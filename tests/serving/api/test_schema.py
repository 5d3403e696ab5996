"""Everything that the OpenAPI description allows, and much that it does not: never the server's fault."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from .conftest import MODEL, Served

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tool's own dependencies

ENDPOINTS = {
    ("/v1/completions", "post"): 80,
    ("/v1/chat/completions", "post"): 60,
    ("/tokenize", "post"): 25,
    ("/detokenize", "post"): 25,
    ("/v1/models", "get"): 2,
    ("/v1/models/{name}", "get"): 10,
    ("/health/live", "get"): 1,
    ("/health/ready", "get"): 1,
    ("/metrics", "get"): 1,
    ("/version", "get"): 1,
}
"""Examples of each."""


def test_every_endpoint_is_described(served: Served) -> None:
    tree = served.http.get("/openapi.json").json()
    assert {(path, method) for path, methods in tree["paths"].items() for method in methods} == ENDPOINTS.keys()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_is_the_servers_fault(served: Served, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    seen: Counter[int] = Counter()
    for (path, method), examples in ENDPOINTS.items():
        if mode is GenerationMode.NEGATIVE and method == "get":
            continue  # there is nothing in it that could be wrong

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=schema[path][method.upper()].as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body and mode is GenerationMode.POSITIVE:
                case.body["model"] = MODEL  # else every one of them is a 404
            response = case.call()
            seen[response.status_code] += 1
            assert response.status_code < 500, response.text

        ask()
    assert seen[400] > 20
    if mode is GenerationMode.POSITIVE:
        assert seen[200] > 40
