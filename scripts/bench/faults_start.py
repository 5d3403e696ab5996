"""How each launcher is asked to run the ranks: ours by a plan, the others as their documentation tells."""

from __future__ import annotations

import os
import shlex
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from faults_lab import Lab
from faults_processes import MARK

from launcher.config.compose import compose
from launcher.planning.commands import RANK_MODULE
from launcher.planning.planner import LocalFacts, make_plan
from launcher.protocol.plan import Host, HostPlan, RunIdentity
from launcher.protocol.rundir import RunDir
from launcher.utils.files import write_json
from launcher.utils.schema import to_tree

_BIN = Path(sys.executable).parent
_HERE = Path(__file__).parent
_COMPOSING = threading.Lock()
"""Hydra keeps what it composes in a global."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to run."""

    folder: Path
    variant: str
    port: int
    lab: Lab | None
    """``None``: it runs on this machine alone."""
    hosts: Sequence[str]
    """Names of its hosts, in the order of ranks."""
    num_ranks: int

    @property
    def program(self) -> tuple[str, ...]:
        """The rank program and its arguments."""
        return (str(_HERE / "faults_rank.py"), str(self.folder), self.variant)

    @property
    def slots(self) -> int:
        """Ranks on each host."""
        return self.num_ranks // len(self.hosts)


def ours(job: Job) -> tuple[Sequence[str], dict[str, str]]:
    """Return our parent's command; writes its plan."""
    run_dir = RunDir(job.folder)
    run_dir.logs.mkdir()
    identity = RunIdentity(run_id=job.folder.name, run_dir=str(job.folder), run_hash="0" * 64, port=job.port)
    words = ["tracker=local"]
    if job.lab is not None:
        words += ["backend=ssh", f"backend.hostfile={job.lab.hostfile}", f"backend.ssh_config={job.lab.ssh_config}"]
    hosts = [_host(name, job) for name in job.hosts]
    with _COMPOSING:
        run = compose(words).run
    plan = make_plan(run, hosts, identity, LocalFacts(environ={}, home=job.folder))
    plan = replace(plan, hosts=tuple(_with_program(host, job) for host in plan.hosts))
    write_json(run_dir.plan, to_tree(plan))
    config = () if job.lab is None else (str(job.lab.ssh_config),)
    return (sys.executable, str(_HERE / "faults_parent.py"), str(run_dir.plan), *config), {}


def torchrun(job: Job) -> tuple[Sequence[str], dict[str, str]]:
    """Return torchrun's own command; on several hosts a shell that starts it on each by ssh and waits for all."""
    command = [str(_BIN / "torchrun"), f"--nproc-per-node={job.slots}", f"--master-port={job.port}"]
    if job.lab is None:
        return (*command, *job.program), {}
    command += [f"--nnodes={len(job.hosts)}", f"--master-addr={job.lab.address(job.hosts[0])}"]
    lines = ["pids="]
    for number, name in enumerate(job.hosts):
        remote = shlex.join([*command, f"--node-rank={number}", *job.program])
        ssh = ["ssh", "-F", str(job.lab.ssh_config), "-o", f"SendEnv={MARK}", name, remote]
        lines.append(f'{shlex.join(ssh)} & pids="$pids $!"')
    lines.append("code=0; for pid in $pids; do wait $pid || code=$?; done; exit $code")
    return ("bash", "-c", "\n".join(lines)), {}


def deepspeed(job: Job) -> tuple[Sequence[str], dict[str, str]]:
    """Return deepspeed's own command, with pdsh for several hosts."""
    command = [str(_BIN / "deepspeed"), "--master_port", str(job.port)]
    env = {"DS_ACCELERATOR": "cpu"}
    path = f"{_BIN}{os.pathsep}{os.environ['PATH']}"
    if job.lab is None:
        return (*command, "--num_gpus", str(job.num_ranks), *job.program), {**env, "PATH": path}
    hostfile = job.folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots={job.slots}\n" for name in job.hosts))
    address = job.lab.address(job.hosts[0])
    command += ["--hostfile", str(hostfile), "--launcher", "pdsh", "--master_addr", address, "--no_ssh_check"]
    if len(job.hosts) == 1:
        command.append("--force_multi")
    ssh = f"-F {job.lab.ssh_config} -o SendEnv={MARK}"
    return (*command, *job.program), {**env, "PATH": path, "PDSH_SSH_ARGS_APPEND": ssh}


STARTS = {"ours": ours, "torchrun": torchrun, "deepspeed": deepspeed}


def _host(name: str, job: Job) -> Host:
    host = Host(name=name, slots=job.slots, cores=job.slots, memory_bytes=16 * 2**30, python=sys.executable)
    if job.lab is None:
        return host
    return replace(host, ssh_destination=name, address=job.lab.address(name), interface="eth0")


def _with_program(host: HostPlan, job: Job) -> HostPlan:
    """Have torchrun start our cheap ranks; everything else of its command stays."""
    argv = host.agent_command.argv
    end = argv.index("--module")
    assert argv[end + 1] == RANK_MODULE, "the planner ends the command with the module"
    return replace(host, agent_command=replace(host.agent_command, argv=(*argv[:end], *job.program)))
