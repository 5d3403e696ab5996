"""``launch doctor``: whether the hosts of a run are fit for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.backends.registry import executor_of
from launcher.cli.arguments import parse_command_line
from launcher.cli.saved_run import find_run_or_option
from launcher.config.compose import compose
from launcher.config.run import Run
from launcher.doctor.examine import default_deadline_s, examine_hosts
from launcher.doctor.protocol import ProbeRequest
from launcher.doctor.report import render_report
from launcher.errors import EXIT_UNFIT
from launcher.runs.config_source import load_saved_run
from launcher.utils.schema import to_tree
from launcher.utils.text import json_text, printable

HELP = """\
launch doctor [RUN] [OVERRIDES] [--json] [--root DIR]: examine the hosts of a run, and start nothing.

  launch doctor                                              this machine
  launch doctor backend=ssh backend.hostfile=hostfile        every host of a hostfile, all at once
  launch doctor +exp=zero3_gpt2xl backend=ssh backend.hostfile=hostfile run.root=/shared/runs
  launch doctor backend=ssh backend.hostfile=hostfile --json everything, for programs
  launch doctor 20260101                                     the hosts of a run that was started before

It finds: hosts that cannot be reached and why, clocks that differ, other versions of python, torch, deepspeed,
transformers, CUDA, NCCL or of this program, a run directory that cannot be written or is not shared, more slots than
GPUs, little memory, disk or /dev/shm, a port of the rendezvous that is taken or that others cannot reach, slow links,
and pairs of hosts between which an all-reduce (NCCL where all have GPUs, else gloo) fails or crawls.

A run on several hosts makes all of these checks but the all-reduces by itself before it starts.
Exit codes: 0 fit for a run, if with warnings; 69 unfit; 2 your mistake.
"""


def run(arguments: Sequence[str]) -> int:
    """Print a report."""
    line = parse_command_line(arguments, takes_runs=True)
    if line.help:
        print(HELP)
        return 0
    if line.words and "=" not in line.words[0]:
        wanted = load_saved_run(find_run_or_option(line.words[0], line), line.words[1:])
    else:
        wanted = compose(line.words, config_dir=line.config_dir).run
    hosts = wanted.backend.hosts(max_ranks=wanted.job.max_ranks(wanted))
    report = examine_hosts(
        hosts,
        executor_of(wanted.backend).remote_command,
        request_of(wanted),
        quick=False,
        deadline_s=default_deadline_s(len(hosts), quick=False),
    )
    print(json_text(to_tree(report)) if line.json else printable(render_report(report)), end="")
    return EXIT_UNFIT if report.errors else 0


def request_of(wanted: Run) -> ProbeRequest:
    """Return what a run asks of its hosts."""
    folder = Path(wanted.run.dir or wanted.run.root).absolute()
    return ProbeRequest(run_dir=str(folder), port=None if wanted.backend.port == "auto" else wanted.backend.port)
