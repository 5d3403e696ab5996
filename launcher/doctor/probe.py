"""Entry of the probe on a host: ``python -m launcher.doctor.probe``. It answers requests.

    doctor → probe                                     probe → doctor
                                                       {"doctor": "hello"}                       at once
    {"ask": "facts", "run_dir", "token", …}            {"doctor": "facts", "clock", "facts"}
    {"ask": "listen", "port"}                          {"doctor": "listen", "port" | "problem"}  the first host only
    {"ask": "contact", "address", "port", …}           {"doctor": "contact", "contact": …}
    {"ask": "close_port"}                              {"doctor": "close_port"}                  the port is free again
    {"ask": "collective", "order"}                     {"doctor": "pair" | "group", …}, …, {"doctor": "collective"}

It exits when its stdin ends, and after ``life_s`` in any case, so that a cut network leaves no process behind.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.doctor.host_facts import collect_host_facts, find_route, measure_contact, open_rendezvous_port, port_owner
from launcher.doctor.protocol import send_message


class Probe:
    """Answers requests in order."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._collective: subprocess.Popen[str] | None = None

    def answer(self, request: dict[str, Any]) -> None:
        """Answer one request; an unknown one, of another version, raises ``KeyError``."""
        answers: dict[str, Callable[..., None]] = {
            "facts": self._send_facts,
            "listen": self._listen,
            "contact": self._contact,
            "close_port": self._close_port,
            "collective": self._measure,
        }
        answers[request.pop("ask")](**request)

    def close(self) -> None:
        """End the collective."""
        if self._collective is not None:
            self._collective.kill()
            self._collective.wait()

    def _send_facts(
        self, *, run_dir: str, token: str | None, is_full: bool, life_s: float, plugins: Sequence[str] = ()
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, life_s)
        if is_full:
            command = [sys.executable, "-m", "launcher.doctor.collective", str(os.getpid())]
            self._collective = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        facts = collect_host_facts(Path(run_dir), token=token, environ=os.environ, plugins=plugins)
        send_message("facts", clock=time.time(), facts=facts)

    def _listen(self, *, port: int | None) -> None:
        try:
            self._listener = open_rendezvous_port(port)
        except OSError as error:
            owner = port_owner(port) if port is not None else None
            problem = os.strerror(error.errno) if error.errno else str(error)  # its message would repeat the port
            send_message("listen", port=None, problem=f"{problem}, by {owner}" if owner else problem)
            return
        send_message("listen", port=self._listener.getsockname()[1], problem=None)

    def _contact(self, *, address: str, port: int | None, timeout_s: float) -> None:
        found = find_route(address) if port is None else measure_contact(address, port, timeout_s=timeout_s)
        send_message("contact", contact=found)

    def _close_port(self) -> None:
        """Free the port, on which the rendezvous listens next."""
        if self._listener is not None:
            self._listener.close()
        send_message("close_port")

    def _measure(self, *, order: dict[str, Any]) -> None:
        threading.Thread(target=self._watch, args=(json.dumps(order),), daemon=True).start()

    def _watch(self, order: str) -> None:
        """Send the order to the collective and wait until it exits."""
        assert self._collective is not None
        self._collective.communicate(order + "\n")
        send_message("collective", exit_code=self._collective.returncode)


def main() -> None:
    """Answer requests from stdin until it ends."""
    send_message("hello")
    probe = Probe()
    try:
        for line in sys.stdin:
            probe.answer(json.loads(line))
    finally:
        probe.close()


if __name__ == "__main__":
    main()
