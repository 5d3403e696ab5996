"""Every verb of the command line: its summary, arguments, options and examples.

The parser, the help texts and shell completion are made from this table, so nothing heavy is imported here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.cli.arguments import (
    Completion,
    Option,
    Positional,
    choice_value,
    config_dir_value,
    count_value,
    path_value,
)
from launcher.config.export import FORMATS
from launcher.utils.text import terminal_width

_EXPERIMENT_OR_RUN = (Completion.EXPERIMENT, Completion.RUN)
_RUN_HELP = "a run id or the beginning of one, or a run directory"
_EXPORT_DTYPES = tuple(dict.fromkeys(dtype for form in FORMATS.values() for dtype in form.dtypes))
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb: ``launcher.cli.<verb>`` executes it."""

    summary: str
    """Summary: one imperative sentence without a full stop."""
    positionals: tuple[Positional, ...] = ()
    options: tuple[Option, ...] = ()
    examples: str = ""
    notes: str = ""
    takes_version: bool = False
    """Whether ``--version`` prints the version."""
    takes_raw_words: bool = False
    """Whether ``--words`` takes all that follows: the unfinished line that a shell completes."""

    @property
    def takes_overrides(self) -> bool:
        """Whether Hydra overrides, and ``dry_run=true`` among them, may be typed."""
        return any(one.name == "overrides" for one in self.positionals)

    @property
    def flags(self) -> tuple[str, ...]:
        """The options that help and completion offer, by their long names."""
        own = (one.names[-1] for one in self.options if not one.is_hidden)
        return (*own, *(["--version"] if self.takes_version else []), "--help")

    def completions(self) -> Iterator[Completion | str]:
        """Yield the completions of its words."""
        for one in self.positionals:
            yield from one.completes


OVERRIDES = Positional(
    name="overrides",
    metavar="OVERRIDE",
    nargs="*",
    completes=(Completion.OVERRIDE,),
    help="Hydra overrides: group=option, key=value, +exp=NAME; dry_run=true prints the plan only",
)
RUN_OR_OVERRIDES = replace(
    OVERRIDES,
    metavar="RUN|OVERRIDE",
    completes=(Completion.RUN, Completion.OVERRIDE),
    help="Hydra overrides: group=option, key=value, +exp=NAME. The first word may name a run instead: "
    f"{_RUN_HELP}; the overrides then change its configuration",
)
OPTIONAL_RUN = Positional(
    name="run",
    metavar="RUN",
    nargs="?",
    completes=(Completion.RUN,),
    help=f"{_RUN_HELP} (default: the newest run)",
)
RUN = replace(OPTIONAL_RUN, nargs=None, help=_RUN_HELP)
RUNS = replace(RUN, name="runs", nargs="*")

JSON = Option(names=("--json",), help="print JSON, for programs")
ROOT = Option(
    names=("--root",),
    metavar="DIR",
    convert=path_value("--root"),
    completes=(Completion.FILE,),
    help="the folder of all runs, run.root, in which run ids are looked up (default: runs)",
)
CONFIG_DIR = Option(
    names=("--config-dir",),
    metavar="DIR",
    convert=config_dir_value,
    completes=(Completion.FILE,),
    help="a folder of your own options and experiments, used beside the shipped ones",
)
MULTIRUN = Option(
    names=("-m", "--multirun"), help="run every combination of the values given as a,b,c, one run after the other"
)
JSON_PLAN = replace(JSON, help="with dry_run=true: print the plan as JSON")
REFUSED_WITH_RUN = (replace(MULTIRUN, is_hidden=True), replace(CONFIG_DIR, is_hidden=True))

LAUNCH = Verb(
    summary="compose, plan, launch and supervise language-model jobs",
    positionals=(OVERRIDES,),
    options=(MULTIRUN, JSON_PLAN, CONFIG_DIR),
    takes_version=True,
)
"""The command without a verb: a run."""

VERBS: dict[str, Verb] = {
    "plan": Verb(
        summary="print what a run would do, and start nothing",
        positionals=(RUN_OR_OVERRIDES,),
        options=(MULTIRUN, replace(JSON, help="print the plan in the format of plan.json"), CONFIG_DIR, ROOT),
        examples="""\
  launch plan                                    the default run
  launch plan +exp=zero3_gpt2xl                  an experiment; the same as launch +exp=zero3_gpt2xl dry_run=true
  launch plan +exp=zero3_gpt2xl backend.ranks=1  the experiment with one option changed
  launch plan +exp=zero3_gpt2xl --json           the whole plan as JSON
  launch plan 20260101                           what the run whose id begins with 20260101 would do if started again
""",
        notes="A plan makes every check that a run makes before it starts. Nothing is written.",
    ),
    "list": Verb(
        summary="list groups, their options, and what each key means",
        positionals=(
            Positional(
                name="groups",
                metavar="GROUP[/OPTION]",
                nargs="*",
                completes=(Completion.GROUP,),
                help="a group, or one of its options (default: all groups)",
            ),
        ),
        options=(CONFIG_DIR,),
        examples="""\
  launch list                   groups and their options
  launch list exp               experiments, one line each
  launch list parallel          options of a group, then its keys with type, default and meaning
  launch list parallel/zero3    one option: its keys with the values it sets
""",
    ),
    "show": Verb(
        summary="print the whole configuration of an experiment or a run, every value resolved",
        positionals=(
            Positional(
                name="source",
                metavar="EXP|RUN",
                completes=_EXPERIMENT_OR_RUN,
                help=f"an experiment, default, or {_RUN_HELP}",
            ),
            OVERRIDES,
        ),
        options=(JSON, CONFIG_DIR, ROOT),
        examples="""\
  launch show zero3_gpt2xl                an experiment
  launch show default model=gpt2          the default run with another model
  launch show runs/gpt2_tiny/20260101-…   the configuration that a run was started with
  launch show 20260101                    the run in ./runs whose id begins with 20260101
""",
    ),
    "diff": Verb(
        summary="print the options in which two experiments or runs differ",
        positionals=tuple(
            Positional(
                name=name.lower(),
                metavar=name,
                completes=_EXPERIMENT_OR_RUN,
                help=f"an experiment, default, or {_RUN_HELP}; quote it together with its overrides",
            )
            for name in "AB"
        ),
        options=(JSON, CONFIG_DIR, ROOT),
        examples="""\
  launch diff zero1_gpt2 zero2_gpt2_large                two experiments
  launch diff default "default model=gpt2 job.steps=20"  with overrides: quote them
  launch diff runs/a/20260101-… runs/a/20260102-…        two runs
  launch diff 20260101 20260102                          two runs, by the beginning of their ids
  launch diff zero3_gpt2xl runs/zero3_gpt2xl/20260101-…  an experiment and a run
""",
        notes="The exit code is 0 whether or not they differ.",
    ),
    "doctor": Verb(
        summary="examine the hosts of a run (versions, clocks, disks, ports, links), and start nothing",
        positionals=(RUN_OR_OVERRIDES,),
        options=(JSON, CONFIG_DIR, ROOT),
        examples="""\
  launch doctor                                               this machine
  launch doctor backend=ssh backend.hostfile=hostfile         every host of a hostfile, all at once
  launch doctor +exp=zero3_gpt2xl backend=ssh backend.hostfile=hostfile run.root=/shared/runs
  launch doctor backend=ssh backend.hostfile=hostfile --json  the whole report as JSON
  launch doctor 20260101                                      the hosts of an earlier run
""",
        notes="""\
The doctor reports:
  hosts that cannot be reached, and why; clocks that differ
  different versions of Python, torch, DeepSpeed, Transformers, CUDA, NCCL or of this program
  a run directory that is not writable or not shared; more slots than GPUs; little memory, disk space or /dev/shm
  a rendezvous port that is in use or that other hosts cannot reach; slow links
  pairs of hosts between which an all-reduce (NCCL where all have GPUs, else Gloo) fails or is slow

A run on several hosts makes these checks before it starts, except the all-reduces.
Exit codes: 0 the hosts are fit (there may be warnings), 69 a host is not fit, 2 a mistake in the command.""",
    ),
    "resume": Verb(
        summary="continue a run in its own directory, from its newest complete checkpoint",
        positionals=(RUN, OVERRIDES),
        options=(JSON_PLAN, ROOT, *REFUSED_WITH_RUN),
        examples="""\
  launch resume runs/gpt2_tiny/20260101-120000-abcd
  launch resume 20260101-120000-abcd                  the same run: an id, or its beginning, is looked up in ./runs
  launch resume 20260101-120000-abcd job.steps=400    train for more steps than planned
  launch resume 20260101-120000-abcd dry_run=true     print the plan, start nothing
""",
        notes="The run keeps its directory and its W&B id. With the same number of ranks it continues exactly.",
    ),
    "rerun": Verb(
        summary="start a run with the configuration of an earlier one, in a new run directory",
        positionals=(RUN, OVERRIDES),
        options=(JSON_PLAN, ROOT, *REFUSED_WITH_RUN),
        examples="""\
  launch rerun runs/gpt2_tiny/20260101-120000-abcd
  launch rerun 20260101-120000-abcd optimizer.lr=1e-4  with one value changed; an id is looked up in ./runs
  launch rerun 20260101-120000-abcd dry_run=true       print the plan, start nothing
""",
        notes="The new run starts at step 0 and leaves the checkpoints of RUN alone. launch resume continues a run.",
    ),
    "sweep": Verb(
        summary="run every combination of a grid, one run after the other; the same as -m",
        positionals=(OVERRIDES,),
        options=(replace(MULTIRUN, is_hidden=True), CONFIG_DIR),
        examples="""\
  launch sweep +sweep=lr_batch                      a shipped grid; the same as launch +sweep=lr_batch
  launch sweep optimizer.lr=1e-4,3e-4 job.seed=1,2  your own grid; the same as launch -m …
  launch sweep … dry_run=true                       list the runs and start none
""",
        notes="""\
All runs are checked before the first one starts. When a run fails, the others still run; the exit code is that of the
first failed run. The table is printed at the end and kept in sweep.json beside the runs.

With backend=slurm the runs are tasks of a job array. The command returns once it is queued (backend.wait=false).""",
    ),
    "runs": Verb(
        summary="list runs and their states, the most recently started first",
        positionals=(replace(RUNS, help=f"{_RUN_HELP}, or another folder of runs (default: every run in --root)"),),
        options=(JSON, ROOT),
        examples="""\
  launch runs            the runs in ./runs
  launch runs DIR        the runs in another folder (run.root); the same as --root DIR
  launch runs 20260101   the run whose id begins with 20260101
  launch runs --json     with all digits
""",
        notes="""\
columns:
  status   running, completed, failed, cancelled, preempted (launch resume continues it),
           lost: its session ended without a result; elsewhere: another machine or a scheduler runs it
  ranks    hosts × ranks on each
  age      time since it was started or last resumed
  took     how long it ran

Every verb that takes a RUN takes an id, the beginning of one, or a run directory; without one it takes the newest.""",
    ),
    "status": Verb(
        summary="show one run in detail: its processes, its progress, and the last line of each rank",
        positionals=(OPTIONAL_RUN,),
        options=(JSON, ROOT),
        examples="""\
  launch status                        the newest run in ./runs
  launch status 20260101               the run whose id begins with 20260101
  launch status runs/gpt2_tiny/2026…   the run in this directory
""",
        notes="""\
The exit code is 0 for every run that exists; launch logs -f ends with the exit code of the run. Of a run in Kubernetes
whose files only its pods have, kubectl asks for its pods.""",
    ),
    "report": Verb(
        summary="write a run, several runs or a sweep as one self-contained HTML file",
        positionals=(
            replace(RUNS, help=f"{_RUN_HELP}, or a sweep directory; several are compared (default: the newest run)"),
        ),
        options=(
            Option(
                names=("--output",),
                metavar="FILE",
                convert=path_value("--output"),
                completes=(Completion.FILE,),
                help="the file (default: report.html in the directory of the run or sweep; of several runs, here)",
            ),
            ROOT,
        ),
        examples="""\
  launch report                             the newest run in ./runs, into its own directory
  launch report 20260101                    the run whose id begins with 20260101
  launch report runs/a/2026… runs/a/2026…   several runs: their curves in one plot, and where they differ
  launch report runs/a/sweep-2026…          a sweep: its trials
  launch report --output today.html         into another file
""",
        notes="""\
It holds curves, tables, pictures, configuration, plan and environment, and why a run failed. It holds no secrets and no
scripts, and loads nothing from a network.""",
    ),
    "logs": Verb(
        summary="print what the ranks of a run print",
        positionals=(OPTIONAL_RUN,),
        options=(
            Option(names=("-f", "--follow"), help="print new lines until the run ends; exit with the run's exit code"),
            Option(names=("--rank",), metavar="K", convert=count_value("--rank"), help="only this rank"),
            Option(names=("--host",), metavar="H", help="only ranks, or with --agents the agent, of this host"),
            Option(
                names=("-n", "--lines"),
                metavar="LINES",
                convert=count_value("-n"),
                help="only the last LINES lines of each log, then what is added",
            ),
            Option(names=("--agents",), help="what torchrun, deepspeed and the host agents print, instead of ranks"),
            ROOT,
        ),
        examples="""\
  launch logs                  everything the newest run has printed, rank after rank
  launch logs -f               follow it until it ends; the exit code is the run's own
  launch logs 2026 --rank 3    one rank of the run whose id begins with 2026
  launch logs -f -n 5          begin with the last 5 lines of each log
  launch logs --agents         what torchrun, deepspeed and the host agents printed
""",
        notes="""\
Each line begins with host:rank. Lines that exist already come log by log, new lines in the order of their arrival.
Of a run in Kubernetes whose files only its pods have, kubectl reads what the first pod prints.
Ctrl-C ends only this command, not the run.""",
    ),
    "cancel": Verb(
        summary="cancel a run from any shell, and return once its processes have exited",
        positionals=(OPTIONAL_RUN,),
        options=(Option(names=("--now",), help="do not let ranks save first; the same as Ctrl-C twice"), ROOT),
        examples="""\
  launch cancel                       the newest run in ./runs
  launch cancel 20260101              the run whose id begins with 20260101
  launch cancel runs/gpt2_tiny/2026…  the run in this directory
  launch cancel --now                 without time to save
""",
        notes="""\
The run receives SIGTERM, so ranks may save a checkpoint before they exit. Only processes recorded by the run are
signalled: by PID and start time, on the machine they run on. A Slurm or Kubernetes job is cancelled by its id. For a
run on another machine, the command to type there is printed. A session.json of another user is refused: it could name
your own processes and jobs.""",
    ),
    "export": Verb(
        summary="write the weights and tokenizer of a run as files that other programs load",
        positionals=(
            Positional(
                name="source",
                metavar="RUN",
                completes=(Completion.RUN,),
                help=f"{_RUN_HELP}, or a checkpoint; RUN@best and RUN@step_00000010 choose one of its checkpoints; "
                "or a model folder",
            ),
            Positional(
                name="folder",
                metavar="DIR",
                completes=(Completion.FILE,),
                help="the folder to write, or the file of format=gguf, which must not exist",
            ),
            Positional(
                name="settings",
                metavar="OPTION",
                nargs="*",
                completes=(
                    *(f"format={name}" for name in FORMATS),
                    *(f"dtype={name}" for name in _EXPORT_DTYPES),
                    *("max_shard_size=5GB", "merge=true", "check=false"),
                ),
                help=f"format={'|'.join(FORMATS)}, dtype (default: fp32), merge=true, max_shard_size=5GB, check=false",
            ),
        ),
        options=(ROOT,),
        examples="""\
  launch export 20260101 mymodel              the newest checkpoint of the run whose id begins with 20260101
  launch export 20260101@best mymodel         the one with the lowest held-out loss
  launch export 20260101 mymodel dtype=bf16   half the size
  launch export runs/gpt2_tiny/2026…/checkpoints/step_00000010 mymodel
  launch export 20260101 my.gguf format=gguf dtype=q8_0   one file for llama.cpp
""",
        notes="""\
Checkpoints of every strategy and number of ranks are exported, one tensor at a time. DIR holds config, generation
config, safetensors with an index, tokenizer and chat template, under the names that Transformers gives them:
AutoModelForCausalLM.from_pretrained(DIR) and AutoTokenizer.from_pretrained(DIR) load it without this program.
The checkpoint is verified first. DIR appears once it is complete.

format=gguf writes one file instead, of Llama and GPT-2, with dtype=fp16 (default), fp32, bf16, q8_0, q4_0, q4_1 or
q4_k.
format=onnx (fp32, int8, int4) and format=openvino (fp16, int8, int4) write folders of Llama for ONNX Runtime GenAI and
OpenVINO GenAI; they need pip install 'launcher[onnx]' and 'launcher[openvino]'. The format's own runtime then runs the
file and its answers are compared; for gguf, if pip install 'launcher[gguf]' has brought it.""",
    ),
    "chat": Verb(
        summary="talk to a model in the terminal: one that a run trained, a folder, or one of the hub",
        positionals=(
            Positional(
                name="source",
                metavar="RUN|MODEL",
                completes=(Completion.RUN,),
                help=f"{_RUN_HELP} (RUN@best and RUN@step_00000010 too), a model folder, an option of the group model, "
                "or a hub name (org/model)",
            ),
            OVERRIDES,
        ),
        options=(CONFIG_DIR, ROOT),
        examples="""\
  launch chat 20260101                         the newest checkpoint of the run whose id begins with 20260101
  launch chat 20260101@best job.temperature=0  its best one; the likeliest token each time
  launch chat smollm2_135m job.max_tokens=64   a pretrained model, short answers
  launch chat mymodel precision=bf16           a folder that launch export wrote
""",
        notes="""\
The model gets the conversation by the chat template of its tokenizer; without one it continues your text. Options are
those of job=generate; job.temperature is 0.7 and job.max_tokens 512 unless you set them. Nothing is written.

Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D ends it.""",
    ),
    "data": Verb(
        summary="print training examples with the tokens that the loss counts",
        positionals=(
            Positional(
                name="action",
                metavar="preview",
                convert=choice_value("data", ("preview",)),
                completes=("preview",),
                help="the only action",
            ),
            replace(OVERRIDES, help=f"{OVERRIDES.help}; rows=3 is the number of rows to show"),
        ),
        options=(CONFIG_DIR,),
        examples="""\
  launch data preview data.path=chat.jsonl model=smollm2_135m   three rows by the model's chat template
  launch data preview data.path=chat.jsonl data.chat_template=chatml rows=10
  launch data preview +exp=NAME job.sequence_length=512         the data of an experiment
""",
        notes="""\
Tokens that the loss counts are green on a terminal, and in ⟦brackets⟧ elsewhere. Each title gives the number of tokens,
how many are trained, and what happens to an example that is longer than a sequence. Nothing is trained or written;
data and a tokenizer that are not on this machine are downloaded.""",
    ),
    "benchmark": Verb(
        summary="compare two runs of a benchmark: is any quantity worse in B than in A",
        positionals=(
            Positional(
                name="action",
                metavar="compare",
                convert=choice_value("benchmark", ("compare",)),
                completes=("compare",),
                help="the only action",
            ),
            *(
                replace(RUN, name=name.lower(), metavar=name, help=f"{_RUN_HELP}, or a benchmark.json file")
                for name in "AB"
            ),
        ),
        options=(
            Option(
                names=("--threshold",),
                metavar="SHARE",
                help="the change of a median that is accepted, as 5% or 0.05 (default: 5%)",
            ),
            Option(names=("--agree",), help="check instead whether each median lies within the range of the other run"),
            JSON,
            ROOT,
        ),
        examples="""\
  launch benchmark compare 20260101 20260102                two runs, by id, by the beginning of an id, or by directory
  launch benchmark compare main.json runs/activation/2026…  a benchmark.json that was kept, and a run
  launch benchmark compare A B --threshold 10%              accept changes of up to a tenth
  launch benchmark compare A B --agree                      is each median within the range of the other run?
""",
        notes="""\
A quantity is worse, or better, when its median changed by more than the threshold and neither median lies within the
range of the other run. Higher is better for quantities that end in _per_s, lower for seconds and bytes. A quantity of
another unit is reported as changed and never fails.

Exit codes: 0 nothing is worse (with --agree: all agree), 1 something is, 2 a mistake in the command.""",
    ),
    "deploy": Verb(
        summary="render what deploys a server into a folder, and apply it to a cluster",
        positionals=(
            replace(
                RUN_OR_OVERRIDES,
                metavar="ACTION|RUN|OVERRIDE",
                completes=("apply", "status", "promote", "rollback", "delete", Completion.RUN, Completion.OVERRIDE),
                help=f"{RUN_OR_OVERRIDES.help}; or an action and a folder that was rendered: apply, status, promote, "
                "rollback or delete",
            ),
        ),
        options=(
            Option(
                names=("--diff",), help="print what would change in the folder (apply: in the cluster), change nothing"
            ),
            CONFIG_DIR,
            ROOT,
        ),
        examples="""\
  launch deploy +exp=serve_smollm2 deploy=kubernetes deploy.out=k8s deploy.image=registry/team/launcher:1
  launch deploy 20260101 deploy=kubernetes deploy.out=k8s deploy.image=…   the server of an earlier run
  launch deploy … --diff                                                   compare with the files in deploy.out
  launch deploy … dry_run=true                                             print the files
  launch deploy apply k8s --diff                                           what would change in the cluster
  launch deploy apply k8s                                                  apply it, and wait until it serves
  launch deploy status k8s                                                 its workloads, pods, weights and gates
  launch deploy promote k8s                                                give a canary more requests while gates pass
  launch deploy rollback k8s                                               give all requests to the baseline
  launch deploy delete k8s                                                 delete it in the cluster
""",
        notes="""\
The options of the server are those of job=serve. Files in deploy.out that launch deploy did not write, or that you
changed since, are never overwritten. A folder stays one deployment, and a canary in it keeps its weights. kubectl and
helm act with your own login on deploy.context and deploy.namespace, and get the files in files.json alone.
The cluster checks every object before apply changes the first one; new pods that do not get ready are taken back.
Promote may be interrupted at any time, and goes on where it was; all state is kept with the weights.
Exit code of --diff: 0 no difference, 1 a difference, 2 a mistake; of promote: 0 promoted, 1 a gate failed and all
requests went back to the baseline, 124 they went back because nothing could be judged in time.""",
    ),
    "completion": Verb(
        summary="print a script that makes a shell complete verbs, groups, options, keys, values and runs",
        positionals=(
            Positional(
                name="shell",
                metavar="SHELL",
                nargs="?",
                convert=choice_value("completion", SHELLS),
                completes=SHELLS,
                help="bash, zsh or fish",
            ),
        ),
        examples="""\
  eval "$(launch completion bash)"                                  in ~/.bashrc
  eval "$(launch completion zsh)"                                   in ~/.zshrc, after compinit
  launch completion fish > ~/.config/fish/completions/launch.fish   once
""",
        notes="Then job.st<Tab> becomes job.steps=, parallel=<Tab> shows its options, and launch logs <Tab> the runs.",
        takes_raw_words=True,
    ),
}
"""Verbs by name: each is ``launcher.cli.<verb>`` with ``run(arguments) -> exit code``.
Without a verb, it is ``launcher.cli.run``."""

_LAUNCH_DESCRIPTION = """\
Compose, plan, launch and supervise language-model jobs.

examples:
  launch                                 train a small model on this machine, now
  launch +exp=zero3_gpt2xl dry_run=true  print the plan of an experiment, start nothing
  launch +exp=zero3_gpt2xl job.steps=20  run it, with one option changed
  launch model=gpt2 parallel=zero2       choose other options of the groups
  launch -m optimizer.lr=1e-4,3e-4       run a grid, one run after the other

verbs (launch VERB --help explains one):
{verbs}

overrides (Hydra's grammar):
  group=option    another option of a group; launch list GROUP shows them all
  key=value       one value, as job.steps=20; launch list job shows keys, defaults and meaning
  +exp=NAME       an experiment; launch list exp explains each
  dry_run=true    print the plan instead of running

groups:
{groups}

experiments:
{exps}"""

LAUNCH_EPILOG = """\
A run writes runs/<name>/<time>-<letters>/: run.yaml, plan.json, metrics.jsonl, logs, checkpoints, result.json.
Exit codes: 0 done, 2 a mistake in the command and nothing started, 65 invalid data or weights found after the start,
69 a host is not fit for the run, 75 preempted, 124 stalled, otherwise that of the first failing rank, or 128+n
for signal n."""


def launch_description() -> str:
    """Return the part of ``launch --help`` above its options."""
    from launcher.config.folders import groups

    options = groups()
    names = [group for group in options if group not in ("exp", "sweep")]
    return _LAUNCH_DESCRIPTION.format(
        verbs="\n".join(f"  {name:12}{verb.summary}" for name, verb in VERBS.items()),
        groups=_wrapped(names),
        exps=_wrapped(options.get("exp", [])),
    )


def _wrapped(words: Sequence[str]) -> str:
    """Return words as an indented paragraph."""
    return textwrap.fill(" ".join(words), min(terminal_width(), 100), initial_indent="  ", subsequent_indent="  ")
