"""Queries in PromQL about servers, shared by alerts, dashboards and the gates of a canary."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.job.serve import Serve
from launcher.config.run import Run
from launcher.protocol.serving_metrics import OWN_PREFIX, SHARED_PREFIX, TTFT


@dataclass(frozen=True, kw_only=True)
class ServingQueries:
    """Queries about servers of one engine.

    The rate of requests and of failures is the server's own count; of ``job.engine=vllm``, whose metrics the server
    passes on, that of vLLM's HTTP server.
    """

    is_vllm: bool
    matchers: tuple[str, ...] = ()
    """Which servers: ``('job="chat"',)``; all by default."""
    by: str = "job"
    """Labels that are kept, separated by commas."""

    def rate(self, metric: str, window: str, *matchers: str, by: str | None = None) -> str:
        """Return the increase of a counter in each second, summed over servers."""
        chosen = ", ".join((*matchers, *self.matchers))
        return f"sum by ({self.by if by is None else by}) (rate({metric}{{{chosen}}}[{window}]))"

    def failures(self, window: str) -> str:
        """Return failed requests in each second."""
        if self.is_vllm:
            return self.rate("http_requests_total", window, 'handler=~"/v1/.*"', 'status="5xx"')
        failed = self.rate(f"{OWN_PREFIX}request_failure_total", window, 'reason=~"error|timeout|draining"')
        full = self.rate(f"{OWN_PREFIX}requests_rejected_total", window, 'reason="queue_full"')
        return f"({failed} + {full})"

    def requests(self, window: str) -> str:
        """Return requests in each second, without those that are wrong or that clients left."""
        if self.is_vllm:
            return self.rate("http_requests_total", window, 'handler=~"/v1/.*"', 'status!="4xx"')
        return f"({self.rate(f'{SHARED_PREFIX}request_success_total', window)} + {self.failures(window)})"

    def failures_or_none(self, window: str) -> str:
        """Return failed requests in each second; 0 where no counter of failures exists yet."""
        return f"({self.failures(window)} or 0 * {self.requests(window)})"

    def failure_share(self, window: str) -> str:
        """Return the share of requests that failed; not a number without requests."""
        return f"{self.failures(window)} / {self.requests(window)}"

    def slow_share(self, window: str, *, ttft_s: float) -> str:
        """Return the share of requests whose first token took longer than a bucket's upper bound."""
        fast = self.rate(f"{TTFT}_bucket", window, f'le="{float(ttft_s)}"')
        return f"1 - {fast} / {self.rate(f'{TTFT}_count', window)}"

    def quantile(self, histogram: str, window: str, *, quantile: float) -> str:
        """Return a quantile of a histogram, over all servers."""
        buckets = self.rate(f"{histogram}_bucket", window, by=f"{self.by}, le" if self.by else "le")
        return f"histogram_quantile({quantile:g}, {buckets})"

    def mean(self, histogram: str, window: str) -> str:
        """Return the mean of a histogram's values."""
        return f"{self.rate(f'{histogram}_sum', window)} / {self.rate(f'{histogram}_count', window)}"

    def tokens_per_s(self, window: str) -> str:
        """Return generated tokens in each second."""
        return self.rate(f"{SHARED_PREFIX}generation_tokens_total", window)


def queries_of(run: Run, *matchers: str, by: str = "job") -> ServingQueries:
    """Return the queries about the servers of ``run``."""
    return ServingQueries(is_vllm=isinstance(run.job, Serve) and run.job.engine == "vllm", matchers=matchers, by=by)
