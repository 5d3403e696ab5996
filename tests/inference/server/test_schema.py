"""Everything that the OpenAPI description allows, and much that it does not: never the server's fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.inference.server.conftest import MODEL, Served

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tool's own dependencies

ENDPOINTS = {
    ("/v1/completions", "post"): 40,
    ("/v1/chat/completions", "post"): 30,
    ("/tokenize", "post"): 12,
    ("/detokenize", "post"): 12,
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
    """Which examples come depends on what else this process has imported, so none is counted: each is judged alone."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
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
            response = case.call()
            assert response.status_code < 500, response.text
            if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
                becomes_right(served, case.path, {**case.body, "model": MODEL})

        ask()


NEEDED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "abc"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}]},
    "/tokenize": {"prompt": "abc", "messages": None},  # either
    "/detokenize": {"tokens": [1]},
}


def becomes_right(served: Served, path: str, body: dict[str, Any]) -> None:
    """Correct each field that the server refuses, as its error names it, until it has nothing against the body."""
    for _ in range(len(body) + 2):
        response = served.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        if response.status_code == 200:
            return
        assert response.status_code == 400, response.text
        name = response.json()["error"]["param"].split(".")[0]
        if name in NEEDED[path]:
            body = {**body, **NEEDED[path]}
        else:
            assert name in body, response.text
            del body[name]
    raise AssertionError(f"{path} refuses {body}: {response.text}")
