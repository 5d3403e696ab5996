"""What every endpoint stands on: the model's words, the engines, the results that are kept, and who is let in."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from launcher.serving.api.bodies import Bounds
from launcher.serving.api.choice import Choice
from launcher.serving.api.problems import ApiError, invalid, of_trouble
from launcher.serving.api.sampling import seed_of
from launcher.serving.front.flight import Flight
from launcher.serving.front.identity import key_of
from launcher.serving.front.numbers import Numbers
from launcher.serving.front.pool import Pool
from launcher.serving.front.results import How, Results
from launcher.serving.values import Request, Sampling
from launcher.serving.words import Words


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How much a server takes on."""

    name: str
    """What clients call the model."""
    capacity: int
    """Sequences that engines work on at a time."""
    max_queue: int
    max_choices: int
    queue_timeout_s: float
    request_timeout_s: float


class Service:
    """One served model.

    Args:
        policy: how much it takes on.
        pool: the engines.
        results: what is kept.
    """

    def __init__(self, policy: Policy, *, pool: Pool, results: Results) -> None:
        self.policy, self.pool, self.results = policy, pool, results
        self.numbers = Numbers(pool, results)
        self.created = int(time.time())
        self.words: Words | None = None
        """Set once the tokenizer is there."""
        self.identity = ""
        """Hash of whatever decides the answers; set with ``words``."""
        self.draining = False
        self.open_requests = 0
        """Generating requests that are not answered to their end."""
        self._numbers = itertools.count()
        self._recent: list[float] = []

    @property
    def fingerprint(self) -> str:
        """What answers call this model's state."""
        return f"fp_{self.identity[:12]}"

    def not_ready(self) -> str:
        """Return why the server cannot answer now; empty when it can."""
        if self.draining:
            return "the server is ending"
        if self.words is None or self.pool.context is None:
            phases = sorted({engine.phase for engine in self.pool.engines})
            return f"the server is starting ({', '.join(phases) or 'tokenizer'})"
        return "" if self.pool.ready else "no engine makes progress"

    def bounds(self) -> Bounds:
        """Return the lengths that bodies may have.

        Raises:
            ApiError: the server takes no requests now.
        """
        if self.draining:
            self.reject("draining")
            raise ApiError(503, "the server is ending", code="draining", retry_s=5, closes=True)
        if self.words is None or self.pool.context is None:
            self.reject("starting")
            raise ApiError(503, self.not_ready(), code="starting", retry_s=2)
        return Bounds(context=self.pool.context, prompts=self.policy.max_choices)

    def opened(self, model: str | None) -> Words:
        """Return the words, if requests for ``model`` are taken.

        Raises:
            ApiError: it is another model, or the server takes none now.
        """
        if model is not None and model != self.policy.name:
            message = f"there is no model {model[:100]!r} here; this server has {self.policy.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        self.bounds()  # it may have begun to end while a large body was looked at
        assert self.words is not None
        return self.words

    def reject(self, reason: str) -> None:
        """Count a request that was not begun."""
        self.numbers.rejected.labels(reason).inc()

    def check_room(self, prompts: Sequence[Sequence[int]], *, choices: int, field: str) -> None:
        """Raise where there is no room for so many sequences, now or ever.

        Raises:
            ApiError: and why.
        """
        context, count = self.pool.context, len(prompts) * choices
        assert context is not None
        for prompt in prompts:
            if not prompt:
                raise invalid("has no tokens, and a sequence must begin with one", field)
            if len(prompt) >= context:
                said = f"has {len(prompt)} tokens, and the model takes at most {context} together with its answer"
                raise invalid(said, field, code="context_length_exceeded")
        if count > self.policy.max_choices:
            param = "n" if choices > 1 else field
            raise invalid(f"asks for {count} sequences at once; this server allows {self.policy.max_choices}", param)
        if self.pool.in_flight + count > self.policy.capacity + self.policy.max_queue:
            self.reject("queue_full")
            raise ApiError(429, "too many requests are waiting", code="queue_full", retry_s=self._soon())

    def choices(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        n: int,
        stops: Sequence[str],
        priority: int,
        echo: bool = False,
    ) -> list[Choice]:
        """Begin every sequence of a request: ``n`` for each prompt."""
        kinds = [replace(sampling, seed=seed_of(sampling.seed, number)) for number in range(n)]
        return [Choice(self, tuple(prompt), kind, stops, priority, echo=echo) for prompt in prompts for kind in kinds]

    def fly(
        self, prompt: tuple[int, ...], sampling: Sampling, stops: Sequence[str], priority: int
    ) -> tuple[Flight, How]:
        """Begin a sequence, or join an equal one, or find its result."""
        request = Request(
            id=f"s{next(self._numbers)}",
            prompt=prompt,
            sampling=sampling,
            priority=priority,
            queue_deadline_s=self.policy.queue_timeout_s,
            deadline_s=self.policy.request_timeout_s,
        )
        if not sampling.repeatable:
            flight, how = Flight(request, on_end=self._ended), "bypass"
        else:
            key = key_of(self.identity, prompt, sampling, stops)
            flight, how = self.results.find(key, Flight(request, on_end=partial(self._landed, key)))
        flight.readers += 1
        if how in ("miss", "bypass"):
            self.pool.submit(flight)
        return flight, how  # type: ignore[return-value]

    def leave(self, flight: Flight) -> None:
        """Take that one reader less waits for a sequence; without any, its engine lets go of it."""
        flight.readers -= 1
        if not flight.readers and not flight.ended:
            flight.fail(Abandoned())

    def _landed(self, key: str, flight: Flight) -> None:
        self.results.landed(key, flight)
        self._ended(flight)

    def _ended(self, flight: Flight) -> None:
        self.pool.forget(flight)
        self.numbers.ended(flight)
        now = time.monotonic()
        self._recent = [at for at in self._recent[-63:] if now - at < 60.0] + [now]

    def _soon(self) -> float:
        """Return when there may be room again, by how fast sequences ended lately."""
        if len(self._recent) < 2:
            return 1.0
        rate = len(self._recent) / max(0.1, time.monotonic() - self._recent[0])
        return min(60.0, self.pool.in_flight / max(rate, 0.01) / 4)


class Abandoned(Exception):
    """Nobody waits for a sequence any more."""


def explained(trouble: Exception, service: Service, *, field: str) -> ApiError:
    """Return the answer for ``trouble``, and count it where nothing was begun."""
    problem = of_trouble(trouble, prompt_field=field)
    if problem.code in ("queue_timeout", "unsupported_value"):
        service.reject(problem.code)
    return problem
