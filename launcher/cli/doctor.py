"""``launch doctor``: whether the hosts of a run are fit for it."""

from __future__ import annotations

from pathlib import Path

from launcher.backends.registry import executor_of
from launcher.cli.arguments import Arguments, is_override
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


def run(arguments: Arguments) -> int:
    """Examine the hosts and print a report."""
    first, *overrides = arguments.overrides or [""]
    if first and not is_override(first):
        wanted = load_saved_run(find_run_or_option(first, arguments), overrides)
    else:
        wanted = compose(arguments.overrides, config_dir=arguments.config_dir).run
    hosts = wanted.backend.hosts(max_ranks=wanted.job.max_ranks(wanted))
    report = examine_hosts(
        hosts,
        executor_of(wanted).remote_command,
        request_of(wanted),
        quick=False,
        deadline_s=default_deadline_s(len(hosts), quick=False),
    )
    print(json_text(to_tree(report)) if arguments.json else printable(render_report(report)), end="")
    return EXIT_UNFIT if report.errors else 0


def request_of(wanted: Run) -> ProbeRequest:
    """Return the request to the probes of a run's hosts."""
    folder = Path(wanted.run.dir or wanted.run.root).absolute()
    port = None if wanted.backend.port == "auto" else wanted.backend.port
    return ProbeRequest(run_dir=str(folder), port=port, plugins=wanted.plugins)
