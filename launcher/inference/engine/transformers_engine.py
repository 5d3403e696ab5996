"""Transformers' continuous batching as an engine; invalid requests are rejected beforehand."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import ContinuousBatchingConfig, GenerationConfig

from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.engines.distributed import choose_device
from launcher.errors import ConfigError, JobError
from launcher.inference.engine.base import (
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    GeneratedToken,
    InferenceEngine,
    InvalidRequest,
)
from launcher.inference.engine.block_manager import TRANSFORMERS_BLOCK_SIZE
from launcher.inference.engine.kv_cache import KVShapes, num_kv_blocks
from launcher.inference.engine.model_loader import load_eos_token_ids, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.continuous_batching.requests import GenerationOutput

    from launcher.config.run import Run


_POLL_S, _NO_WAIT_S, _ENDS_IN_S = 0.05, 0.0, 1.0
_SUPPORTED = frozenset({"max_tokens", "ignore_eos", "stop_token_ids"})
"""Fields of ``SamplingParams`` that may differ from plain greedy decoding."""
_NO_EOS = -1


@dataclass(slots=True)
class _ActiveRequest:
    """One request that has not ended."""

    request: EngineRequest
    arrived_s: float
    name: str
    """Its id in the manager: never reused, because the manager cancels asynchronously."""
    started: bool = False
    output: list[int] = field(default_factory=list)


class TransformersEngine(InferenceEngine):
    """Greedy decoding by Transformers' ``ContinuousBatchingManager``, on its own thread.

    The manager gets no more requests than fit, and none that would crash it: longer than its cache, or with tokens that
    the model does not have. Requests that it never finishes, such as cancelled ones, are finished here.

    Args:
        model: in inference mode.
        limits: sizes of steps and batches.
        num_blocks: of the KV cache, of 256 tokens each.
        eos_token_ids: tokens that end a sequence.
    """

    _active: dict[str, _ActiveRequest]

    def __init__(
        self, model: PreTrainedModel, *, limits: EngineLimits, num_blocks: int, eos_token_ids: Sequence[int]
    ) -> None:
        config = model.config.get_text_config()
        longest = min(config.max_position_embeddings, num_blocks * TRANSFORMERS_BLOCK_SIZE)
        super().__init__(limits, max_model_len=longest, vocab_size=config.vocab_size, num_blocks=num_blocks)
        self._eos_token_ids = tuple(eos_token_ids)
        self._ids: dict[str, str] = {}
        self._numbers = itertools.count()
        self._generated = self._prompted = self._steps = 0
        self._stepped_s = time.monotonic()
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=_NO_EOS, max_new_tokens=1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=TRANSFORMERS_BLOCK_SIZE,
                num_blocks=num_blocks,
                max_batch_tokens=limits.prefill_chunk_size + limits.max_num_seqs,
                max_requests_per_batch=limits.max_num_seqs,
                allow_block_sharing=limits.enable_prefix_caching,
                auto_switch_to_flash=False,
            ),
        )
        self._manager.start()

    def _accept(self, request: EngineRequest) -> None:
        """Queue a request."""
        defaults = SamplingParams(max_tokens=1)
        for name in SamplingParams.__dataclass_fields__:
            if name not in _SUPPORTED and getattr(request.sampling, name) != getattr(defaults, name):
                if name == "seed" and request.sampling.temperature == 0:
                    continue  # greedy decoding draws nothing
                raise InvalidRequest(name, "engine=transformers decodes greedily and changes no scores")
        if not self._active:
            self._stepped_s = time.monotonic()
        active = _ActiveRequest(request, time.monotonic(), name=str(next(self._numbers)))
        self._active[request.id], self._ids[active.name] = active, request.id

    def step(self) -> Sequence[EngineOutput]:
        """Submit the requests that fit; return outputs since the last call, after a brief wait.

        Raises:
            JobError: the thread has ended: no request is at fault, and none can continue.
        """
        outputs = [self._end(name, "cancelled") for name in dict.fromkeys(self._cancelled) if name in self._active]
        self._cancelled.clear()
        outputs += [self._end(name, "timeout") for name in self._find_expired()]
        outputs += self._submit()
        if not any(active.started for active in self._active.values()):
            return outputs
        wait_s = _POLL_S
        while (result := self._manager.get_result(timeout=wait_s)) is not None:
            wait_s = _NO_WAIT_S
            self._stepped_s = time.monotonic()
            self._steps += 1
            try:
                output = self._handle_result(result)
            except JobError:
                raise
            except Exception as error:  # noqa: BLE001  (any error: the other requests continue)
                output = self._failed(self._ids.get(result.request_id), error)
            outputs += [output] if output else []
        if not outputs:
            self._check_alive()
        return outputs

    def stats(self) -> EngineStats:
        """Return its counts."""
        started = [active for active in self._active.values() if active.started]
        return EngineStats(
            running=len(started),
            waiting=len(self._active) - len(started),
            kv_cache_tokens=sum(_length(active) for active in started),
            kv_cache_capacity=self._num_blocks * TRANSFORMERS_BLOCK_SIZE,
            steps_total=self._steps,
            prompt_tokens_total=self._prompted,
            generated_tokens_total=self._generated,
            since_step_s=time.monotonic() - self._stepped_s if self._active else 0.0,
        )

    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Run sequences of each shape; they do not count."""
        self._run_shapes(shapes)
        self._generated = self._prompted = self._steps = 0

    def close(self) -> None:
        """End the thread and its requests."""
        self._manager.stop(block=True, hard_stop=True)
        self._manager.destroy()
        self._active.clear()

    def _find_expired(self) -> list[str]:
        now = time.monotonic()
        return [
            name
            for name, active in self._active.items()
            if active.request.is_expired(now - active.arrived_s, is_started=active.started)
        ]

    def _end(self, request: str, finish_reason: FinishReason) -> EngineOutput:
        active = self._active.pop(request)
        del self._ids[active.name]
        if active.started:
            self._manager.cancel_request(active.name)
        return EngineOutput(request_id=request, finish_reason=finish_reason)

    def _submit(self) -> list[EngineOutput]:
        """Submit waiting requests in order, as long as they fit at full length.

        None is ever preempted.

        Returns:
            Those that could not be submitted, with why.
        """
        failed: list[EngineOutput] = []
        started = [active for active in self._active.values() if active.started]
        free = self._num_blocks - sum(self._blocks(active) for active in started)
        slots = self._limits.max_num_seqs - len(started)
        waiting = [active for active in self._active.values() if not active.started]
        for active in sorted(waiting, key=self._rank):
            free, slots = free - self._blocks(active), slots - 1
            if free < 0 or slots < 0:
                break
            sampling = active.request.sampling
            stop_ids = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos_token_ids)]
            try:
                self._manager.add_request(
                    list(active.request.prompt),
                    request_id=active.name,
                    max_new_tokens=self._max_tokens(active),
                    streaming=True,
                    eos_token_id=stop_ids or _NO_EOS,
                )
            except Exception as error:  # noqa: BLE001  (any error: the other requests continue)
                output = self._failed(active.request.id, error)
                failed += [output] if output else []
                continue
            active.started = True
            self._prompted += len(active.request.prompt)
        return failed

    def _failed(self, request: str | None, error: Exception) -> EngineOutput | None:
        """Finish a request with an error; return its last output, if it is still active."""
        active = self._active.pop(request, None) if request is not None else None
        if active is None:
            return None
        self._ids.pop(active.name, None)
        if active.started:
            self._manager.cancel_request(active.name)
        return EngineOutput(
            request_id=active.request.id, finish_reason="error", error=f"{type(error).__name__}: {error}"
        )

    def _rank(self, active: _ActiveRequest) -> float:
        return self._limits.rank(arrived_s=active.arrived_s, priority=active.request.priority)

    def _max_tokens(self, active: _ActiveRequest) -> int:
        """Return the most tokens that it can generate."""
        return min(active.request.sampling.max_tokens, self.max_model_len - len(active.request.prompt))

    def _blocks(self, active: _ActiveRequest) -> int:
        return -(-(len(active.request.prompt) + self._max_tokens(active)) // TRANSFORMERS_BLOCK_SIZE)

    def _check_alive(self) -> None:
        if not self._manager.is_running():
            raise JobError("Transformers' continuous batching has ended; see its error above")

    def _handle_result(self, result: GenerationOutput) -> EngineOutput | None:
        """Return the outputs of a result; of a request that has ended, none."""
        request = self._ids.get(result.request_id)
        if request is None:
            return None
        active = self._active[request]
        new = result.generated_tokens[len(active.output) :]
        active.output += new
        self._generated += len(new)
        finish_reason: FinishReason | None = None
        if result.error is not None:
            until = time.monotonic() + _ENDS_IN_S
            while time.monotonic() < until:  # where its thread is ending, no request is at fault
                self._check_alive()
                time.sleep(_POLL_S)
            finish_reason = "error"
        elif result.is_finished():
            sampling = active.request.sampling
            stop_ids = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos_token_ids)}
            finish_reason = "stop" if active.output and active.output[-1] in stop_ids else "length"
        if finish_reason:
            del self._active[request], self._ids[active.name]
        tokens = tuple(GeneratedToken(id=number) for number in new)
        return EngineOutput(request_id=request, tokens=tokens, finish_reason=finish_reason, error=result.error or "")


def _length(active: _ActiveRequest) -> int:
    return len(active.request.prompt) + len(active.output)


def make_transformers_engine(
    run: Run, *, limits: EngineLimits, heartbeat: Callable[[], None], local_rank: int = 0
) -> InferenceEngine:
    """Return Transformers' continuous batching around the model of a run, on this rank's GPU.

    Raises:
        ConfigError: there is no GPU, or it computes nothing the way that the run says.
        EnvironmentProblem: weights cannot be fetched.
    """
    device = choose_device(local_rank)
    if device.type == "cpu":
        why = "Transformers' continuous batching is made for GPUs, and there is none here; paged is faster on CPUs"
        raise ConfigError("job.engine", "transformers", why=why, fix="set job.engine=paged")
    model = load_model(run, device=device, engine="transformers", heartbeat=heartbeat)
    return transformers_engine_for(
        model, limits=limits, eos_token_ids=load_eos_token_ids(run, model, heartbeat=heartbeat)
    )


def transformers_engine_for(
    model: PreTrainedModel, *, limits: EngineLimits, eos_token_ids: tuple[int, ...]
) -> InferenceEngine:
    """Return Transformers' continuous batching around a model in inference mode, on any device."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = ((heads, head_dim),) * config.num_hidden_layers
    shapes = KVShapes(keys=shape, values=shape, item_bytes=model.dtype.itemsize)
    return TransformersEngine(
        model,
        limits=limits,
        num_blocks=num_kv_blocks(limits, shapes, model, block_size=TRANSFORMERS_BLOCK_SIZE),
        eos_token_ids=eos_token_ids,
    )
