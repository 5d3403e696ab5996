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
    Refused,
    check_request,
)
from launcher.inference.engine.block_manager import TRANSFORMERS_BLOCK_SIZE
from launcher.inference.engine.kv_cache import KVShapes, num_kv_blocks
from launcher.inference.engine.model_loader import end_of_sequence_ids, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.continuous_batching.requests import GenerationOutput

    from launcher.config.run import Run


_POLL_S, _NO_WAIT_S, _ENDS_IN_S = 0.05, 0.0, 1.0
_SUPPORTED = frozenset({"max_tokens", "ignore_eos", "stop_token_ids"})
"""Fields of ``Sampling`` that may differ from greedy decoding as it is."""
_NO_END = -1


@dataclass(slots=True)
class _ActiveRequest:
    """One request that has not ended."""

    request: EngineRequest
    arrived_s: float
    name: str
    """What the manager calls it: never used again, for it may cancel later than it is told to."""
    begun: bool = False
    output: list[int] = field(default_factory=list)


class TransformersEngine(InferenceEngine):
    """Greedy decoding by Transformers' ``ContinuousBatchingManager``, which runs on a thread of its own.

    It is given no more requests than fit, and none that would end it: longer than its room, with tokens that the model
    does not have. What it gives no last word about, a cancelled request say, gets one here.

    Args:
        model: in inference mode.
        limits: how much at a time.
        num_pages: room for keys and values, of 256 tokens each.
        ends: tokens that end a sequence.
    """

    def __init__(self, model: PreTrainedModel, *, limits: EngineLimits, num_pages: int, ends: Sequence[int]) -> None:
        config = model.config.get_text_config()
        self._limits, self._ends, self._num_pages = limits, tuple(ends), num_pages
        self._context: int = min(config.max_position_embeddings, num_pages * TRANSFORMERS_BLOCK_SIZE)
        self._vocab_size = config.vocab_size
        self._tasks: dict[str, _ActiveRequest] = {}
        self._over: list[tuple[str, FinishReason]] = []
        self._ids: dict[str, str] = {}
        self._numbers = itertools.count()
        self._generated = self._prompted = self._steps = 0
        self._stepped_s = time.monotonic()
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=_NO_END, max_new_tokens=1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=TRANSFORMERS_BLOCK_SIZE,
                num_blocks=num_pages,
                max_batch_tokens=limits.prefill_chunk_size + limits.max_num_seqs,
                max_requests_per_batch=limits.max_num_seqs,
                allow_block_sharing=limits.enable_prefix_caching,
                auto_switch_to_flash=False,
            ),
        )
        self._manager.start()

    @property
    def context(self) -> int:
        """Most tokens of a sequence."""
        return self._context

    def add(self, request: EngineRequest) -> None:
        """Queue a request, or refuse it."""
        check_request(
            request,
            known=self._tasks,
            context=self._context,
            vocab_size=self._vocab_size,
            num_pages=self._num_pages,
            max_num_seqs=self._limits.max_num_seqs,
        )
        usual = SamplingParams(max_tokens=1)
        for name in SamplingParams.__dataclass_fields__:
            if name not in _SUPPORTED and getattr(request.sampling, name) != getattr(usual, name):
                if name == "seed" and request.sampling.temperature == 0:
                    continue  # greedy decoding draws nothing
                raise Refused(name, "engine=transformers decodes greedily and changes no scores")
        if not self._tasks:
            self._stepped_s = time.monotonic()
        task = _ActiveRequest(request, time.monotonic(), name=str(next(self._numbers)))
        self._tasks[request.id], self._ids[task.name] = task, request.id

    def cancel(self, request_id: str) -> None:
        """End a request before the next step."""
        if request_id in self._tasks:
            self._over.append((request_id, "cancelled"))

    def step(self) -> Sequence[EngineOutput]:
        """Hand over what there is room for; return what has come since the last call, waiting a little for it.

        Raises:
            JobError: the thread has ended: no request is to blame, and none can go on here.
        """
        self._find_late()
        updates = [self._end(request, finish) for request, finish in self._over if request in self._tasks]
        self._over.clear()
        updates += self._begin()
        if not any(task.begun for task in self._tasks.values()):
            return updates
        wait_s = _POLL_S
        while (result := self._manager.get_result(timeout=wait_s)) is not None:
            wait_s = _NO_WAIT_S
            self._stepped_s = time.monotonic()
            self._steps += 1
            try:
                update = self._took(result)
            except JobError:
                raise
            except Exception as error:  # noqa: BLE001  (whatever it is, the other requests go on)
                update = self._failed(self._ids.get(result.request_id), error)
            updates += [update] if update else []
        if not updates:
            self._check_alive()
        return updates

    def stats(self) -> EngineStats:
        """Return where it stands."""
        begun = [task for task in self._tasks.values() if task.begun]
        return EngineStats(
            running=len(begun),
            waiting=len(self._tasks) - len(begun),
            kv_cache_tokens=sum(_length(task) for task in begun),
            kv_cache_capacity=self._num_pages * TRANSFORMERS_BLOCK_SIZE,
            steps_total=self._steps,
            prompt_tokens_total=self._prompted,
            generated_tokens_total=self._generated,
            since_step_s=time.monotonic() - self._stepped_s if self._tasks else 0.0,
        )

    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Have sequences of each shape go through, cut to what fits."""
        for number, (sequences, tokens) in enumerate(shapes):
            for index in range(min(sequences, self._limits.max_num_seqs)):
                prompt = tuple((number + index + at) % self._vocab_size for at in range(min(tokens, self._context - 2)))
                sampling = SamplingParams(max_tokens=2, ignore_eos=True)
                self.add(EngineRequest(id=f"warm-up {number} {index}", prompt=prompt, sampling=sampling))
            while not self.idle:
                self.step()
        self._generated = self._prompted = self._steps = 0

    def close(self) -> None:
        """End the thread and what it works on."""
        self._manager.stop(block=True, hard_stop=True)
        self._manager.destroy()
        self._tasks.clear()

    def _find_late(self) -> None:
        now = time.monotonic()
        for task in self._tasks.values():
            waited, request = now - task.arrived_s, task.request
            queued = request.queue_deadline_s is not None and not task.begun and waited > request.queue_deadline_s
            if queued or (request.deadline_s is not None and waited > request.deadline_s):
                self._over.append((request.id, "timeout"))

    def _end(self, request: str, finish: FinishReason) -> EngineOutput:
        task = self._tasks.pop(request)
        del self._ids[task.name]
        if task.begun:
            self._manager.cancel_request(task.name)
        return EngineOutput(request=request, finish=finish)

    def _begin(self) -> list[EngineOutput]:
        """Hand over the most due requests, as long as they fit at their full length: nothing is ever put back.

        Returns:
            Those that could not be handed over, with why.
        """
        failed: list[EngineOutput] = []
        begun = [task for task in self._tasks.values() if task.begun]
        free = self._num_pages - sum(self._pages(task) for task in begun)
        room = self._limits.max_num_seqs - len(begun)
        waiting = [task for task in self._tasks.values() if not task.begun]
        for task in sorted(waiting, key=self._rank):
            free, room = free - self._pages(task), room - 1
            if free < 0 or room < 0:
                break
            sampling = task.request.sampling
            ends = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._ends)]
            try:
                self._manager.add_request(
                    list(task.request.prompt),
                    request_id=task.name,
                    max_new_tokens=self._most(task),
                    streaming=True,
                    eos_token_id=ends or _NO_END,
                )
            except Exception as error:  # noqa: BLE001  (whatever it is, the other requests go on)
                update = self._failed(task.request.id, error)
                failed += [update] if update else []
                continue
            task.begun = True
            self._prompted += len(task.request.prompt)
        return failed

    def _failed(self, request: str | None, error: Exception) -> EngineOutput | None:
        """End one request that something went wrong with; return its last update, if it is there still."""
        task = self._tasks.pop(request, None) if request is not None else None
        if task is None:
            return None
        self._ids.pop(task.name, None)
        if task.begun:
            self._manager.cancel_request(task.name)
        return EngineOutput(request=task.request.id, finish="error", problem=f"{type(error).__name__}: {error}")

    def _rank(self, task: _ActiveRequest) -> float:
        return self._limits.rank(arrived_s=task.arrived_s, priority=task.request.priority)

    def _most(self, task: _ActiveRequest) -> int:
        """Return how many tokens it gets at most."""
        return min(task.request.sampling.max_tokens, self._context - len(task.request.prompt))

    def _pages(self, task: _ActiveRequest) -> int:
        return -(-(len(task.request.prompt) + self._most(task)) // TRANSFORMERS_BLOCK_SIZE)

    def _check_alive(self) -> None:
        if not self._manager.is_running():
            raise JobError("Transformers' continuous batching has ended; its words are above")

    def _took(self, result: GenerationOutput) -> EngineOutput | None:
        """Return what a result means to its request; those that have ended meanwhile are over."""
        request = self._ids.get(result.request_id)
        if request is None:
            return None
        task = self._tasks[request]
        new = result.generated_tokens[len(task.output) :]
        task.output += new
        self._generated += len(new)
        finish: FinishReason | None = None
        if result.error is not None:
            until = time.monotonic() + _ENDS_IN_S
            while time.monotonic() < until:  # where its thread is ending no request is to blame
                self._check_alive()
                time.sleep(_POLL_S)
            finish = "error"
        elif result.is_finished():
            sampling = task.request.sampling
            ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._ends)}
            finish = "stop" if task.output and task.output[-1] in ends else "length"
        if finish:
            del self._tasks[request], self._ids[task.name]
        tokens = tuple(GeneratedToken(id=number) for number in new)
        return EngineOutput(request=request, tokens=tokens, finish=finish, problem=result.error or "")


def _length(task: _ActiveRequest) -> int:
    return len(task.request.prompt) + len(task.output)


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
    return transformers_engine_for(model, limits=limits, ends=end_of_sequence_ids(run, model, heartbeat=heartbeat))


def transformers_engine_for(model: PreTrainedModel, *, limits: EngineLimits, ends: tuple[int, ...]) -> InferenceEngine:
    """Return Transformers' continuous batching around a model in inference mode, on any device."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = ((heads, width),) * config.num_hidden_layers
    shapes = KVShapes(keys=shape, values=shape, item_bytes=model.dtype.itemsize)
    return TransformersEngine(
        model, limits=limits, num_pages=num_kv_blocks(limits, shapes, model, page=TRANSFORMERS_BLOCK_SIZE), ends=ends
    )
