"""A canary on one machine: a bad version is rolled back by its gates, a good one is promoted.

    python scripts/bench/canary_rehearsal.py --kind haproxy

A real load balancer splits requests between a server of the baseline and one of a new version, a real Prometheus
scrapes both, and ``launch deploy promote`` moves the weights. The bad version takes 1 s for each token. The promotion
of the good one is killed (SIGKILL) after one of its steps, and started again. It prints what promote printed.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import print_machine
from load_balancer import KINDS, SERVER, LoadBalancer
from load_balancing import Stream
from monitored_runs import monitoring_folder, running_prometheus
from soak_server import SoakServer

from launcher.utils.system import free_port

BAD_STEP_S, GOOD_STEP_S = 1.0, 0.02
"""Seconds for each token of a version."""
GATES = ("deploy.canary_tokens_per_s=3", "deploy.canary_slowdown=null", "deploy.canary_ttft_p95_s=null")
"""A good version keeps far above these, on a busy machine too."""


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What became of one new version."""

    lines: tuple[str, ...]
    """Printed by ``launch deploy promote``."""
    code: int
    percent: int
    """Of the requests, that the new version gets in the end."""


@contextlib.contextmanager
def scraping(folder: Path, ports: Sequence[int]) -> Iterator[str]:
    """Run Prometheus with what ``deploy=monitoring`` renders; yield its address."""
    targets = f"deploy.targets=[{','.join(f'127.0.0.1:{port}' for port in ports)}]"
    monitoring_folder(folder, ((*SERVER, "deploy.scrape_every_s=1", targets),))
    with running_prometheus(folder) as address:
        yield address


def rehearse(
    kind: str,
    folder: Path,
    *,
    baseline: int,
    new: int,
    prometheus: str,
    words: Sequence[str] = (),
    kill_at: str | None = None,
    say: Callable[[str], object] = print,
) -> Promotion:
    """Return what became of a new version behind a load balancer with traffic.

    Args:
        kind: ``nginx`` or ``haproxy``.
        folder: for the files of the load balancer.
        baseline: port of the server that serves already.
        new: port of the new version.
        prometheus: address of one that scrapes both.
        words: overrides of the group deploy.
        kill_at: kill the first promotion after a line with this text, and start another one.
        say: prints a line.
    """
    upstreams = (f"deploy.upstreams=[127.0.0.1:{baseline}]", f"deploy.canary_upstreams=[127.0.0.1:{new}]")
    own = (f"deploy.admin_socket={folder}/admin.sock",) if kind == "haproxy" else ()
    balancer = LoadBalancer(kind, folder, (*upstreams, f"deploy.canary_prometheus={prometheus}", *GATES, *own, *words))
    load = Stream(balancer.url, model="gpt2_tiny", seed=0, output_len="2-4", concurrency=8)
    load.start()
    try:
        lines, code = _promote(folder, say, kill_at=kill_at)
        if kill_at is not None:
            more, code = _promote(folder, say)
            lines += more
        shown = _launch("status", folder)
    finally:
        load.finish()
        balancer.close()
    say(shown)
    return Promotion(lines=tuple(lines), code=code, percent=int(shown.partition(" gets ")[2].partition(" ")[0]))


def _promote(folder: Path, say: Callable[[str], object], *, kill_at: str | None = None) -> tuple[list[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "deploy", "promote", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    assert process.stdout is not None, "it is a pipe"
    for line in process.stdout:
        lines.append(line.rstrip())
        say(lines[-1])
        if kill_at is not None and kill_at in line:
            process.kill()
            break
    process.stdout.close()
    return lines, process.wait()


def _launch(action: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "deploy", action, str(folder)], capture_output=True, text=True, check=True
    )
    return done.stdout


def main() -> int:
    """Rehearse a bad and a good version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="haproxy", help="load balancer (default: haproxy)")
    parser.add_argument("overrides", nargs="*", help="of the group deploy")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that servers end too
    words = ("deploy.canary_interval_s=10", "deploy.canary_checks=2", "deploy.canary_min_requests=10")
    print_machine("uvicorn")
    with tempfile.TemporaryDirectory() as text, contextlib.ExitStack() as stack:
        folder, ports = Path(text), [free_port() for _ in range(3)]
        for name, port, step_s in zip(
            ("baseline", "bad", "good"), ports, (GOOD_STEP_S, BAD_STEP_S, GOOD_STEP_S), strict=True
        ):
            (folder / name).mkdir()
            server = SoakServer(
                [*SERVER[1:-1], f"job.echo_step_s={step_s}"], replicas=1, folder=folder / name, port=port
            )
            stack.callback(server.kill)
            server.wait_until_ready()
        prometheus = stack.enter_context(scraping(folder / "prometheus", ports))
        found = {}
        for name, port, kill_at in (("bad", ports[1], None), ("good", ports[2], "gets 25 %")):
            print(f"\n{name} version:")
            found[name] = rehearse(
                arguments.kind,
                folder / f"balancer-{name}",
                baseline=ports[0],
                new=port,
                prometheus=prometheus,
                words=(*words, *arguments.overrides),
                kill_at=kill_at,
            )
    codes = (found["bad"].code, found["good"].code)
    print(f"\nexit code of promote: bad {codes[0]}, good {codes[1]}")
    return 0 if codes == (1, 0) else 1


if __name__ == "__main__":
    sys.exit(main())
