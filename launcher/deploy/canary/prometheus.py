"""Ask Prometheus for one number, through its HTTP API."""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from launcher.errors import EnvironmentProblem

_TIMEOUT_S = 20.0
_MAX_BYTES = 1 << 20


class Prometheus:
    """A Prometheus at an address.

    Args:
        address: ``http://localhost:9090``; a path may follow.
        option: that holds it, for errors.
    """

    def __init__(self, address: str, *, option: str = "deploy.canary_prometheus") -> None:
        self._url, self._where = f"{address.rstrip('/')}/api/v1/query", f"{option}={address}"

    def value(self, query: str) -> float | None:
        """Return the value of an instant query; ``None`` where it has no series, or is not a number.

        Raises:
            EnvironmentProblem: Prometheus cannot be reached, refuses the query, or answers with several series.
        """
        answer = self._answer(query)
        if answer.get("status") != "success":
            raise EnvironmentProblem(f"{self._where}: Prometheus refuses the query: {answer.get('error')}; {query}")
        try:
            data = answer["data"]
            result = [data["result"]] if data["resultType"] == "scalar" else [each["value"] for each in data["result"]]
            values = [float(text) for _, text in result]
        except (KeyError, TypeError, ValueError) as error:
            raise self._no_prometheus() from error
        if len(values) > 1:
            raise EnvironmentProblem(f"{self._where}: {len(values)} series instead of one answer {query}")
        return values[0] if values and not math.isnan(values[0]) else None

    def _answer(self, query: str) -> dict[str, Any]:
        body = urllib.parse.urlencode({"query": query}).encode()
        request = urllib.request.Request(self._url, data=body)  # noqa: S310 (the option takes http and https alone)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310 (as above)
                text = response.read(_MAX_BYTES)
        except urllib.error.HTTPError as error:
            text = error.read(_MAX_BYTES)
            if error.code not in (400, 422, 503):
                why = f"{self._where}: Prometheus answers with status {error.code}"
                raise EnvironmentProblem(f"{why}; give the address of its API without a login") from error
        except (OSError, http.client.HTTPException) as error:
            why = f"{self._where}: Prometheus cannot be reached: {getattr(error, 'reason', None) or error}"
            fix = "start it, or `kubectl port-forward` to it and set deploy.canary_prometheus=http://localhost:9090"
            raise EnvironmentProblem(f"{why}; {fix}") from error
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._no_prometheus() from error
        if not isinstance(answer, dict):
            raise self._no_prometheus()
        return answer

    def _no_prometheus(self) -> EnvironmentProblem:
        return EnvironmentProblem(f"{self._where}: what answers there is not the API of Prometheus")
