"""Bring alerts to firing by what they are about, on a real server and real training runs, until all have ended.

    python scripts/bench/provoke_alerts.py --divide 20

A real Prometheus evaluates the rules that ``launch deploy`` renders. ``--divide 20`` makes their windows and waits so
much shorter; with the windows as rendered it takes 40 minutes, most of them idle. It prints each change of an alert's
state, and at the end how long after its cause each alert fired, and how long after the end of the cause it ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import print_machine
from load_balancer import SERVER
from monitored_runs import TrainingRun, alert_states, monitoring_folder, running_prometheus, wait_until
from soak_server import SoakServer

from launcher.utils.system import free_port

SEATS, STEP_S = 2, 0.5
"""Sequences that the server works on at a time, and seconds for each of their tokens."""
LONG, SHORT = 20, 2
"""Tokens of an answer under overload: 2 / (20 × 0.5 s) = 0.2 requests a second are completed; and otherwise."""
OVERLOAD_EVERY_S = 0.5
"""Seconds between arrivals: ten times what the server completes."""
_WAIT_S = 3 * 3600.0
_OPEN = 300
"""Connections that wait at a time; the oldest is closed before a further one."""


@dataclass(kw_only=True)
class Provoked:
    """What became of one alert; times are seconds since the start."""

    event: str
    began: float
    fired: float | None = None
    over: float | None = None
    """End of the event."""
    ended: float | None = None

    @property
    def row(self) -> str:
        """The row of a Markdown table."""
        after = [
            "–" if first is None or last is None else f"{last - first:.0f} s"
            for first, last in ((self.began, self.fired), (self.over, self.ended))
        ]
        return f"{self.event} | {' | '.join(after)}"


@dataclass
class Watch:
    """The alerts of a Prometheus over time.

    Args:
        states: returns the state of each active alert.
        say: prints a line.
    """

    states: Callable[[], dict[str, str]]
    say: Callable[[str], object] = print
    provoked: dict[str, Provoked] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)
    _seen: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Look twice a second until the end of the block."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.5):
                with contextlib.suppress(OSError):  # a busy Prometheus that did not answer in time
                    self.look()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def look(self) -> None:
        """Print each alert whose state has changed, and note when a provoked one fires and ends."""
        found = dict(self.states())
        for name in sorted({*found, *self._seen}):
            state = found.get(name, "inactive")
            if state == self._seen.get(name, "inactive"):
                continue
            self.note(f"{name} {state}")
            if (about := self.provoked.get(name)) is None:
                continue
            if state == "firing" and about.fired is None:
                about.fired = self.now
            about.ended = self.now if state == "inactive" and about.fired is not None else None
        self._seen = found

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def note(self, text: str) -> None:
        """Print a line with its time."""
        self.say(f"{self.now:6.0f} s  {text}")

    def calm(self, seconds: float) -> None:
        """Wait, and see that no alert is active.

        Raises:
            RuntimeError: one is.
        """
        until = self.now + seconds
        while self.now < until:
            if self._seen:
                raise RuntimeError(f"active before anything happened: {self._seen}")
            time.sleep(0.1)

    def begins(self, event: str, *alerts: str) -> None:
        """Note an event that alerts are about.

        Raises:
            RuntimeError: one of them is active already.
        """
        if early := self._seen.keys() & set(alerts):
            raise RuntimeError(f"active before the event: {sorted(early)}")
        self.note(event)
        self.provoked |= {name: Provoked(event=event, began=self.now) for name in alerts}

    def ends(self, event: str, *alerts: str) -> None:
        """Note the end of an event."""
        self.note(event)
        for name in alerts:
            self.provoked[name].over = self.now

    def wait_until_fired(self, *alerts: str) -> None:
        """Return once these alerts have fired."""
        self._wait(lambda: all(self.provoked[name].fired is not None for name in alerts), alerts)

    def wait_until_ended(self, *alerts: str) -> None:
        """Return once these alerts, which have fired, are inactive."""
        self._wait(lambda: all(self.provoked[name].ended is not None for name in alerts), alerts)

    def _wait(self, condition: Callable[[], bool], alerts: Sequence[str]) -> None:
        wait_until(condition, seconds=_WAIT_S, shown=lambda: f"waited too long for {alerts}; active: {self._seen}")

    def table(self) -> Iterator[str]:
        """Yield the lines of a Markdown table."""
        yield "| alert | event | fires after | ends after the event |"
        yield "|---|---|---|---|"
        for name, about in self.provoked.items():
            yield f"| `{name}` | {about.row} |"


class Arrivals(threading.Thread):
    """Clients that arrive at a rate, whatever the server does, and wait for their answer until all leave at once.

    Args:
        port: of the server on this machine.
        every_s: seconds between two arrivals.
        tokens: of each answer.
    """

    def __init__(self, port: int, *, every_s: float, tokens: int) -> None:
        super().__init__(daemon=True)
        self._port, self._every_s, self._tokens = port, every_s, tokens
        self._leaves, self._open = threading.Event(), deque[socket.socket]()
        self.start()

    def run(self) -> None:
        """Send a request whenever it is time for one."""
        body = {"model": "gpt2_tiny", "prompt": "hello", "max_tokens": self._tokens, "ignore_eos": True}
        sent = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(sent)}\r\nConnection: close\r\n\r\n"
        )
        while not self._leaves.wait(self._every_s):
            with contextlib.suppress(OSError):  # nothing listens while the server is down
                connection = socket.create_connection(("127.0.0.1", self._port), timeout=10)
                self._open.append(connection)
                connection.sendall(head.encode() + sent)
            if len(self._open) > _OPEN:
                self._open.popleft().close()

    def leave(self) -> None:
        """Close all connections; arrive no more."""
        self._leaves.set()
        self.join()
        for connection in self._open:
            connection.close()


def provoke(folder: Path, *, divide: int) -> Watch:
    """Return what became of the alerts, once all provoked ones have ended.

    Args:
        folder: for everything that is started.
        divide: shortens windows and waits of the rules, and times of the server that matter to them.
    """
    port, training_port = free_port(), free_port()
    words = (
        *SERVER[1:-1],
        *(f"job.max_num_seqs={SEATS}", f"job.echo_step_s={STEP_S}", f"job.queue_timeout_s={60 / divide:g}"),
    )
    every = f"deploy.scrape_every_s={max(1, 15 // divide)}"
    serving = ("job=serve", *words, "tracker=local", "deploy.name=chat", f"deploy.targets=[127.0.0.1:{port}]", every)
    training = ("tracker=prometheus", f"tracker.port={training_port}", "deploy.name=training", every)
    monitoring_folder(folder / "monitoring", (serving, (*training, f"deploy.stalled_s={300 // divide}")), divide=divide)
    with contextlib.ExitStack() as stack:

        def server(name: str) -> SoakServer:
            (folder / name).mkdir()
            found = SoakServer(words, replicas=1, folder=folder / name, port=port)
            stack.callback(found.kill)
            found.wait_until_ready()
            return found

        def run(name: str, *more: str) -> TrainingRun:
            found = TrainingRun(folder / name, port=training_port, overrides=("job.eval_every=0", *more))
            stack.callback(found.end)
            return found

        first, trained = server("server"), run("training")
        trained.wait_for("train_step")
        prometheus = stack.enter_context(running_prometheus(folder / "monitoring"))
        light = Arrivals(port, every_s=max(0.5, 5 / divide), tokens=SHORT)
        stack.callback(light.leave)
        watch = Watch(lambda: dict(alert_states(prometheus)))
        stack.enter_context(watch.looking())
        watch.calm(60 / divide)

        rank = trained.rank()
        rank.send_signal(signal.SIGSTOP)
        watch.begins("the rank of a training run is stopped (SIGSTOP)", "TrainingStalled")
        overload = ("ServingErrorBudgetBurnsFast", "ServingQueueGrows")
        watch.begins("ten times as many requests arrive as the server completes", *overload)
        crowd = Arrivals(port, every_s=OVERLOAD_EVERY_S, tokens=LONG)
        stack.callback(crowd.leave)
        watch.wait_until_fired(*overload)
        crowd.leave()
        watch.ends("the clients leave", *overload)
        watch.wait_until_ended("ServingQueueGrows")

        watch.begins("the server is killed (SIGKILL)", "ServingDown", "ServingRestarts")
        first.kill()
        watch.wait_until_fired("ServingDown")
        server("server again")
        watch.ends("the server is started again", "ServingDown", "ServingRestarts")
        watch.wait_until_fired("ServingRestarts")

        watch.wait_until_fired("TrainingStalled")
        rank.send_signal(signal.SIGCONT)
        watch.ends("the rank continues (SIGCONT)", "TrainingStalled")
        watch.wait_until_ended("TrainingStalled")
        watch.begins("the rank is killed (SIGKILL)", "TrainingFailed")
        rank.kill()
        watch.wait_until_fired("TrainingFailed")
        trained.end()
        watch.ends("the run has ended", "TrainingFailed")

        diverges = run("diverging", "optimizer.lr=1e30", "job.on_bad_step=skip", "job.max_bad_steps=1000000")
        diverges.wait_for("train_step")
        watch.begins("a training run diverges (optimizer.lr=1e30)", "TrainingLossNotFinite")
        watch.wait_until_fired("TrainingLossNotFinite")
        diverges.end()
        watch.ends("that run is ended", "TrainingLossNotFinite")
        watch.wait_until_ended(*watch.provoked)
    return watch


def main() -> None:
    """Provoke the alerts, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divide", type=int, default=1, help="make windows and waits so much shorter (default: 1)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that everything ends too
    print_machine("uvicorn", "torch")
    with tempfile.TemporaryDirectory() as folder:
        watch = provoke(Path(folder), divide=arguments.divide)
    print("", *watch.table(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
