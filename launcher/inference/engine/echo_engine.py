"""An engine without a model that repeats its prompts, for tests of what surrounds an engine."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from launcher.config.inference import EngineLimits
from launcher.inference.engine.base import (
    EngineOutput,
    EngineRequest,
    EngineStats,
    GeneratedToken,
    InferenceEngine,
)

_LOGPROB = -0.5


@dataclass
class _ActiveRequest:
    """One request that has not ended."""

    request: EngineRequest
    arrived_s: float
    random: random.Random
    started: bool = False
    output: list[int] = field(default_factory=list)

    def next_token(self) -> int:
        """Return the prompt's tokens in turn, or any of them where tokens are drawn."""
        prompt = self.request.prompt
        if self.request.sampling.temperature > 0:
            return prompt[self.random.randrange(len(prompt))]
        return prompt[len(self.output) % len(prompt)]


class EchoEngine(InferenceEngine):
    """Repeats prompts from their beginning; with a temperature, draws from their tokens.

    Of the sampling parameters it applies ``max_tokens``, ``min_tokens``, ``stop_token_ids``, ``ignore_eos``, ``seed``,
    ``logprobs`` and ``num_beams`` (all tokens come at once); the others change nothing.

    Args:
        limits: ``max_num_seqs`` run at a time.
        max_model_len: longest sequence, prompt and output together.
        vocab_size: ids from this one on are refused.
        eos_token_ids: ids that end a sequence.
        step_s: what each step with something to do takes.
    """

    _active: dict[str, _ActiveRequest]

    def __init__(
        self,
        *,
        limits: EngineLimits,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Collection[int] = (),
        step_s: float = 0.0,
    ) -> None:
        super().__init__(limits, max_model_len=max_model_len, vocab_size=vocab_size)
        self._eos_token_ids, self._step_s = frozenset(eos_token_ids), step_s
        self._steps = self._prompt_tokens = self._generated = 0
        self._stepped_at = time.monotonic()

    def _accept(self, request: EngineRequest) -> None:
        """Queue a request."""
        generator = random.Random(request.sampling.seed)
        self._active[request.id] = _ActiveRequest(request, time.monotonic(), generator)

    def step(self) -> Sequence[EngineOutput]:
        """Give every running request its next token."""
        outputs = [
            EngineOutput(request_id=name, finish_reason="cancelled")
            for name in self._cancelled
            if self._active.pop(name, None)
        ]
        self._cancelled.clear()
        outputs += self._expired()
        running = self._admitted()
        if running and self._step_s:
            time.sleep(self._step_s)
        outputs += filter(None, map(self._try_advance, running))
        if running:
            self._steps += 1
        self._stepped_at = time.monotonic()
        return outputs

    def stats(self) -> EngineStats:
        """Return its counts."""
        started = [active for active in self._active.values() if active.started]
        return EngineStats(
            running=len(started),
            waiting=len(self._active) - len(started),
            kv_cache_tokens=sum(len(active.request.prompt) + len(active.output) for active in started),
            kv_cache_capacity=self._limits.max_num_seqs * self.max_model_len,
            steps_total=self._steps,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated,
            since_step_s=time.monotonic() - self._stepped_at if self._active else 0.0,
        )

    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Do nothing: there is nothing to compile."""

    def close(self) -> None:
        """Drop all requests."""
        self._active.clear()

    def _expired(self) -> list[EngineOutput]:
        now = time.monotonic()
        expired = [
            name
            for name, active in self._active.items()
            if active.request.is_expired(now - active.arrived_s, is_started=active.started)
        ]
        for name in expired:
            del self._active[name]
        return [EngineOutput(request_id=name, finish_reason="timeout") for name in expired]

    def _admitted(self) -> list[_ActiveRequest]:
        """Start the requests that fit, by priority; return all that are running."""
        running = [active for active in self._active.values() if active.started]
        waiting = sorted(
            (active for active in self._active.values() if not active.started),
            key=lambda active: (-active.request.priority, active.arrived_s),
        )
        for active in waiting[: self._limits.max_num_seqs - len(running)]:
            active.started = True
            self._prompt_tokens += len(active.request.prompt)
            running.append(active)
        return running

    def _try_advance(self, active: _ActiveRequest) -> EngineOutput | None:
        """Return the output of one request; an error ends that request only."""
        try:
            return self._advance(active)
        except Exception as error:  # noqa: BLE001  (any error: the other requests continue)
            self._active.pop(active.request.id, None)
            return EngineOutput(
                request_id=active.request.id, finish_reason="error", error=f"{type(error).__name__}: {error}"
            )

    def _advance(self, active: _ActiveRequest) -> EngineOutput | None:
        sampling, token = active.request.sampling, active.next_token()
        active.output.append(token)
        self._generated += 1
        length = len(active.output)
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self._eos_token_ids)
        is_full = length >= sampling.max_tokens or length + len(active.request.prompt) >= self.max_model_len
        is_over = token in ends and length > sampling.min_tokens
        finish_reason = "stop" if is_over else "length" if is_full else None
        if finish_reason:
            del self._active[active.request.id]
        if sampling.num_beams > 1 and not finish_reason:
            return None
        new = active.output if sampling.num_beams > 1 else [token]
        tokens = tuple(self._token(each, sampling.logprobs) for each in new)
        return EngineOutput(request_id=active.request.id, tokens=tokens, finish_reason=finish_reason)  # type: ignore[arg-type]

    def _token(self, number: int, logprobs: int | None) -> GeneratedToken:
        if logprobs is None:
            return GeneratedToken(id=number)
        count = min(logprobs, self._vocab_size)
        top = tuple(((number + more) % self._vocab_size, _LOGPROB - more) for more in range(count))
        return GeneratedToken(id=number, logprob=_LOGPROB, top=top)
