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
    check_request,
)

_LOGPROB = -0.5
_UNLIMITED_BLOCKS = 1 << 40


@dataclass
class _ActiveRequest:
    """One request that has not ended."""

    request: EngineRequest
    arrived: float
    random: random.Random
    begun: bool = False
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
        limits: ``max_num_seqs`` are worked on at a time.
        context: most tokens of a sequence.
        vocab_size: ids from this one on are refused.
        ends: ids that end a sequence by themselves.
        step_s: what each step with something to do takes.
    """

    def __init__(
        self, *, limits: EngineLimits, context: int, vocab_size: int, ends: Collection[int] = (), step_s: float = 0.0
    ) -> None:
        self._limits, self._context, self._vocab_size = limits, context, vocab_size
        self._ends, self._step_s = frozenset(ends), step_s
        self._all: dict[str, _ActiveRequest] = {}
        self._cancelled: list[str] = []
        self._steps = self._prompt_tokens = self._generated = 0
        self._stepped_at = time.monotonic()

    def add(self, request: EngineRequest) -> None:
        """Queue a request."""
        check_request(
            request,
            known=self._all,
            context=self._context,
            vocab_size=self._vocab_size,
            num_pages=_UNLIMITED_BLOCKS,
            max_num_seqs=self._limits.max_num_seqs,
        )
        generator = random.Random(request.sampling.seed)
        self._all[request.id] = _ActiveRequest(request, time.monotonic(), generator)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step."""
        if request_id in self._all:
            self._cancelled.append(request_id)

    def step(self) -> Sequence[EngineOutput]:
        """Give every running request its next token."""
        updates = [
            EngineOutput(request=name, finish="cancelled") for name in self._cancelled if self._all.pop(name, None)
        ]
        self._cancelled.clear()
        updates += self._expired()
        running = self._admitted()
        if running and self._step_s:
            time.sleep(self._step_s)
        updates += filter(None, map(self._advanced, running))
        if running:
            self._steps += 1
        self._stepped_at = time.monotonic()
        return updates

    def stats(self) -> EngineStats:
        """Return where it stands."""
        begun = [sequence for sequence in self._all.values() if sequence.begun]
        return EngineStats(
            running=len(begun),
            waiting=len(self._all) - len(begun),
            kv_cache_tokens=sum(len(sequence.request.prompt) + len(sequence.output) for sequence in begun),
            kv_cache_capacity=self._limits.max_num_seqs * self._context,
            steps_total=self._steps,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated,
            since_step_s=time.monotonic() - self._stepped_at if self._all else 0.0,
        )

    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Do nothing: nothing is slow the first time."""

    def close(self) -> None:
        """Forget everything."""
        self._all.clear()

    @property
    def context(self) -> int:
        """Most tokens of a sequence."""
        return self._context

    def _expired(self) -> list[EngineOutput]:
        now = time.monotonic()
        late = [sequence.request.id for sequence in self._all.values() if _is_late(sequence, now)]
        for name in late:
            del self._all[name]
        return [EngineOutput(request=name, finish="timeout") for name in late]

    def _admitted(self) -> list[_ActiveRequest]:
        """Begin what there is room for, the most urgent first; return all that are begun."""
        running = [sequence for sequence in self._all.values() if sequence.begun]
        waiting = sorted(
            (sequence for sequence in self._all.values() if not sequence.begun),
            key=lambda sequence: (-sequence.request.priority, sequence.arrived),
        )
        for sequence in waiting[: self._limits.max_num_seqs - len(running)]:
            sequence.begun = True
            self._prompt_tokens += len(sequence.request.prompt)
            running.append(sequence)
        return running

    def _advanced(self, sequence: _ActiveRequest) -> EngineOutput | None:
        """Return what a step brings one request; what goes wrong ends that one alone."""
        try:
            return self._advance(sequence)
        except Exception as error:  # noqa: BLE001  (whatever it is, the other requests go on)
            self._all.pop(sequence.request.id, None)
            return EngineOutput(request=sequence.request.id, finish="error", problem=f"{type(error).__name__}: {error}")

    def _advance(self, sequence: _ActiveRequest) -> EngineOutput | None:
        sampling, token = sequence.request.sampling, sequence.next_token()
        sequence.output.append(token)
        self._generated += 1
        length = len(sequence.output)
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self._ends)
        is_full = length >= sampling.max_tokens or length + len(sequence.request.prompt) >= self._context
        is_over = token in ends and length > sampling.min_tokens
        finish = "stop" if is_over else "length" if is_full else None
        if finish:
            del self._all[sequence.request.id]
        if sampling.num_beams > 1 and not finish:
            return None
        new = sequence.output if sampling.num_beams > 1 else [token]
        tokens = tuple(self._token(each, sampling.logprobs) for each in new)
        return EngineOutput(request=sequence.request.id, tokens=tokens, finish=finish)  # type: ignore[arg-type]

    def _token(self, number: int, logprobs: int | None) -> GeneratedToken:
        if logprobs is None:
            return GeneratedToken(id=number)
        count = min(logprobs, self._vocab_size)
        top = tuple(((number + more) % self._vocab_size, _LOGPROB - more) for more in range(count))
        return GeneratedToken(id=number, logprob=_LOGPROB, top=top)


def _is_late(sequence: _ActiveRequest, now: float) -> bool:
    waited, request = now - sequence.arrived, sequence.request
    queued_too_long = request.queue_deadline_s is not None and not sequence.begun and waited > request.queue_deadline_s
    return queued_too_long or (request.deadline_s is not None and waited > request.deadline_s)
