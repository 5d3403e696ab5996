"""The command line: a verb, or overrides that compose, plan and run."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import launcher
from launcher.errors import ConfigError, LauncherError
from launcher.errors.secrets import redact
from launcher.utils.system import describe_full_disk, is_disk_full_error
from launcher.utils.text import did_you_mean, printable

VERBS = {
    "plan": "print what a run would do, and start nothing",
    "list": "groups, options, and what each option means",
    "show": "print the whole configuration of an experiment",
    "diff": "compare two experiments or two runs",
    "doctor": "examine the hosts of a run: versions, clocks, disks, ports, links",
    "resume": "continue a run from its newest checkpoint",
    "rerun": "start a stored run anew, with changes",
    "sweep": "run a grid; the same as -m",
    "runs": "list runs: what each does, or how it ended",
    "status": "one run in detail",
    "report": "a run, several runs or a sweep as one HTML file",
    "logs": "what its ranks print, as it comes",
    "cancel": "end a run, from any shell",
    "benchmark": "compare two runs of a benchmark",
    "completion": "completion of verbs, groups, options and keys for bash, zsh and fish",
}
"""Each is ``launcher.cli.<verb>`` with ``run(arguments) -> exit code``; bare overrides are the verb ``run``."""

HELP = """\
launch: compose, plan, launch and supervise language-model jobs.

  launch                                 train a small model on this machine, now
  launch +exp=zero3_gpt2xl dry_run=true  print the plan of an experiment, start nothing
  launch +exp=zero3_gpt2xl job.steps=20  run it, with one option changed
  launch model=gpt2 parallel=zero2       choose other options of the groups
  launch -m optimizer.lr=1e-4,3e-4       run a grid, one run after the other

verbs
{verbs}
  Each explains itself: launch VERB --help

overrides (Hydra's grammar)
  group=option      another option of a group   {groups}
  a.b=value         one value                   launch list job   shows keys, defaults and meaning
  +exp=NAME         an experiment               {exps}
  dry_run=true      print the plan instead of running
  -m, --multirun    run every combination of the values given as a,b,c
  --config-dir DIR  a folder of your own options and experiments beside the shipped ones
  --version         print the version

A run writes runs/<name>/<time>-<letters>/: run.yaml, plan.json, metrics.jsonl, logs, checkpoints, result.json.
Exit codes: 0 done, 2 your mistake and nothing started, 65 data or weights found bad after the start, 69 a host is not
fit for the run, 75 preempted, 124 stalled, else the first failing rank's own code, 128+n for signal n.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except LauncherError as error:
        print(f"error: {printable(redact(str(error), os.environ))}".replace("\n", "\nerror: "), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # while a run lasts, its session takes it
        print("interrupted: nothing is running", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `launch list | head`: the reader has gone, nothing is left to say
        sys.stderr.close()
        return 0
    except OSError as error:
        if not is_disk_full_error(error):
            raise
        folder = Path(error.filename or ".").absolute().parent
        print(
            f"error: {describe_full_disk(folder) or error}: free some of it, then type the command again",
            file=sys.stderr,
        )
        return 1


def _dispatch(words: list[str]) -> int:
    first = words[0] if words else ""
    if first in ("-h", "--help", "help"):
        print(_help_text())
        return 0
    if first in ("-V", "--version", "version"):
        print(f"launch {launcher.__version__}")
        return 0
    if first in ("-sc", "--shell-completion"):
        raise ConfigError(first, why="is Hydra's, which knows no verb of ours", fix="see launch completion --help")
    is_verb = first and "=" not in first and first[0] not in "-+~"
    if is_verb and first not in VERBS:
        raise ConfigError(first, why="is neither a verb nor option=value", fix=_meant(first))
    verb, arguments = (first, words[1:]) if is_verb else ("run", words)
    code: int = importlib.import_module(f"launcher.cli.{verb}").run(arguments)
    return code


def _meant(word: str) -> str:
    """Return what to write instead of a first word that is neither a verb nor an override."""
    from launcher.config.compose import groups
    from launcher.config.overrides import suggest_overrides

    meant = suggest_overrides(word, groups())
    return f"write {' or '.join(meant)}" if meant else did_you_mean(word, VERBS)


def _help_text() -> str:
    from launcher.config.compose import groups

    options = groups()
    exps = ", ".join(options.get("exp", []))
    names = " ".join(group for group in options if group not in ("exp", "sweep"))
    verbs = "\n".join(f"  {verb:10} {meaning}" for verb, meaning in VERBS.items())
    return HELP.format(verbs=verbs, groups=names, exps=exps)


if __name__ == "__main__":
    sys.exit(main())
