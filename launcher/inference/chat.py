"""A conversation with a model in a terminal, by one engine in this process."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TextIO

from launcher.config.sampling import SamplingParams
from launcher.inference.batch.requests import line_seed
from launcher.inference.detokenizer import TextStream
from launcher.inference.engine.base import EngineRequest, InferenceEngine, InvalidRequest
from launcher.utils.text import without_escapes

if TYPE_CHECKING:
    from launcher.config.job.generate import Generate
    from launcher.inference.tokenizer import TextTokenizer

_PROMPT = "> "
_COMMANDS = {"/reset": "forget the conversation", "/exit": "end it (as Ctrl-D)", "/help": "list the commands"}
_ANSWER_SHARE = 2
"""One part in so many of the model's longest sequence is kept for the answer."""

Messages = list[dict[str, str]]


@dataclass(kw_only=True)
class Conversation:
    """What was said, as the tokens that the next answer continues.

    With a chat template it is messages; without one, a text that both sides write on.
    """

    tokenizer: TextTokenizer
    max_tokens: int
    """Tokens of a prompt at most; a longer one loses its oldest messages, or its beginning."""
    messages: Messages = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Add what the user wrote."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the model's answer."""
        self.messages.append({"role": "assistant", "content": text})

    def forget(self) -> None:
        """Begin again."""
        self.messages.clear()

    def prompt(self) -> list[int]:
        """Return the tokens to continue.

        Raises:
            ValueError: the chat template refuses these messages, and why.
        """
        if not self.tokenizer.has_chat_template:
            return self.tokenizer.encode(self._text())[-self.max_tokens :]
        while True:
            ids = self.tokenizer.encode_chat(self.messages)
            if len(ids) <= self.max_tokens or len(self.messages) < 3:
                return ids
            del self.messages[:2]

    def _text(self) -> str:
        """Return what both wrote; a line that the user adds later begins a new one."""
        lines = ("\n" * (number > 0 and message["role"] == "user") for number, message in enumerate(self.messages))
        return "".join(line + message["content"] for line, message in zip(lines, self.messages, strict=True))


@dataclass(kw_only=True)
class Chat:
    """Reads lines, streams answers.

    Ctrl-C ends an answer, or clears the line; Ctrl-D or ``/exit`` ends the conversation.
    """

    engine: InferenceEngine
    tokenizer: TextTokenizer
    sampling: SamplingParams
    """Of each answer; one that draws tokens has a seed of its own."""
    adapter: str = ""
    """Name of the adapter that answers; empty is the base model."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are no part of it."""
    seed: int = 0
    lines: Callable[[], str] = lambda: input(_PROMPT if sys.stdin.isatty() else "")
    """Returns the next line.

    Raises:
        EOFError: there is none.
    """
    out: TextIO = field(default_factory=lambda: sys.stdout)

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        longest = self.engine.max_model_len - min(self.sampling.max_tokens, self.engine.max_model_len // _ANSWER_SHARE)
        self._said = Conversation(tokenizer=self.tokenizer, max_tokens=max(1, longest))

    def run(self) -> None:
        """Talk until the user ends it."""
        kind = "chat template" if self.tokenizer.has_chat_template else "no chat template: it continues your text"
        self._print(f"{kind}. /reset forgets, /exit or Ctrl-D ends, Ctrl-C stops an answer\n")
        while (line := self._next_line()) is not None:
            if line in _COMMANDS or (line.startswith("/") and line[1:].isalpha()):
                if line == "/exit":
                    return
                self._command(line)
            elif line.strip():
                self._reply(line)

    def _next_line(self) -> str | None:
        """Return a line that the user entered; ``None`` at the end."""
        while True:
            try:
                return self.lines().encode(errors="replace").decode()  # half a surrogate pair is no character
            except KeyboardInterrupt:
                self._print("\n")
            except EOFError:
                self._print("\n")
                return None

    def _command(self, line: str) -> None:
        if line == "/reset":
            self._said.forget()
            self._print("(the conversation is forgotten)\n")
            return
        if line not in _COMMANDS:
            self._print(f"no such command: {line}\n")
        for name, meaning in _COMMANDS.items():
            self._print(f"{name:8}{meaning}\n")

    def _reply(self, line: str) -> None:
        """Stream the answer to a line, and keep both."""
        before = [dict(message) for message in self._said.messages]
        self._said.ask(line)
        number = next(self._numbers)
        seed = line_seed(self.seed, number) if self.sampling.temperature > 0 else None
        try:
            prompt = tuple(self._said.prompt())
            sampling = replace(self.sampling, seed=seed)
            self.engine.add(EngineRequest(id=f"{number}", prompt=prompt, sampling=sampling, adapter=self.adapter))
        except (InvalidRequest, ValueError) as refused:
            self._said.messages[:] = before
            self._print(f"(not sent: {refused})\n")
            return
        text = TextStream(self.tokenizer.decode, self.stop)
        pieces = []
        with _interruptible() as interrupted:
            for piece in self._stream(f"{number}", text, interrupted):
                pieces.append(piece)
                self._print(piece)
        self._said.answer("".join(pieces))
        self._print("\n")

    def _stream(self, request_id: str, text: TextStream, interrupted: Callable[[], bool]) -> Iterator[str]:
        """Yield the text of an answer as it is generated."""
        while True:
            if interrupted() or text.stopped is not None:
                self.engine.cancel(request_id)
            for output in self.engine.step():
                for token in output.tokens:
                    if text.stopped is None:
                        yield text.feed(token.id)
                if output.finish_reason is not None:
                    yield text.rest()
                    if output.finish_reason == "error":
                        yield f"\n(failed: {output.error})"
                    elif output.finish_reason == "cancelled" and text.stopped is None:
                        self._print(" (stopped)")
                    elif output.finish_reason == "length":
                        self._print(" (cut: job.max_tokens, or the model's longest sequence)")
                    return

    def _print(self, text: str) -> None:
        self.out.write(without_escapes(text))
        self.out.flush()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C came, which then interrupts nothing else."""
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def sampling_of(job: Generate) -> SamplingParams:
    """Return the sampling that the options of a job describe."""
    kept_apart = ("stop", "model")  # arguments of the chat itself: what ends an answer, and its adapter
    values: Mapping[str, object] = {name: value for name, value in job.default_fields.items() if name not in kept_apart}
    return SamplingParams(**values)  # type: ignore[arg-type]


def edit_lines() -> None:
    """Let the user edit lines and recall earlier ones, where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input uses it once it is imported)
