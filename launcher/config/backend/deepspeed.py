"""The real ``deepspeed`` command with its hostfile, for people who want exactly that.

What it cannot be trusted with is kept from it. It gets a hostfile that is sure to be there, because it would run here
without one; an argument that no shell can damage; no variables to export, because it quotes them wrongly; and no say
in how the run ended. Ranks get the rest from the run directory, and are watched through it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from launcher.config.backend.ssh import HostfileBackend
from launcher.config.paths import PathText
from launcher.errors import ConfigError
from launcher.errors.secrets import is_secret

if TYPE_CHECKING:
    from launcher.protocol.outcome import RunOutcome
    from launcher.protocol.plan import Command, Host, HostPlan, Plan, RunIdentity
    from launcher.remote.command import RemoteCommand

_PROGRAMS = {"pdsh": ("pdsh", "pdsh"), "openmpi": ("mpirun", "openmpi-bin"), "slurm": ("srun", "slurm-client")}
"""By runner: what it starts, and the Debian package that has it."""

_SAFE = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
"""What every shell on the way, and pdsh with its ``%``, leaves alone."""

_AGENT_MODULE = "launcher.supervision.external_launcher"
_RANK_MODULE = "launcher.jobs.external_rank"


@dataclass(frozen=True, kw_only=True)
class DeepspeedBackend(HostfileBackend):
    """Ranks are processes that ``deepspeed --hostfile`` starts, in a run directory that all hosts share."""

    kind: ClassVar[str] = "deepspeed"

    agent: Literal["torchrun", "deepspeed"] = "deepspeed"
    """Which launcher starts the ranks of one host: deepspeed's own."""

    runner: Literal["pdsh", "openmpi", "slurm"] = "pdsh"
    """What deepspeed reaches the hosts with."""

    ssh_config: PathText | None = None
    """Configuration file for ssh instead of ``~/.ssh/config``."""

    def validate(self) -> Iterator[ConfigError]:
        """Refuse what deepspeed has no way to do."""
        yield from super().validate()
        if self.agent != "deepspeed":
            yield self.error("agent", "deepspeed starts ranks by itself", "leave it out, or set backend=ssh")
        if self.python not in (None, sys.executable):
            fix = f"start the run with that interpreter, or set backend=ssh; this one is {sys.executable}"
            yield self.error("python", "deepspeed uses on every host the interpreter that it runs with here", fix)
        if self.min_hosts is not None:
            yield self.error("min_hosts", "works with agents on the hosts", "leave it out, or set backend=ssh")
        if self.ssh_config is not None and not _SAFE.fullmatch(str(Path(self.ssh_config).absolute())):
            yield self.error("ssh_config", "pdsh takes its path apart at spaces", "use a path of plain letters")

    def validate_hosts(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Refuse hosts, paths and a machine that the chosen runner cannot work with."""
        from launcher.remote.bundle import code_root

        yield from super().validate_hosts(hosts)
        if self.ssh_config is not None and not Path(self.ssh_config).is_file():
            yield self.error("ssh_config", "no such file", "leave it out to use ~/.ssh/config")
        program, package = _PROGRAMS[self.runner]
        if shutil.which(program) is None:
            fix = f"install it (Debian: apt install {package}) or set backend=ssh"
            yield self.error("runner", f"{program} is not installed here", fix)
        for what, path in (("the program", str(code_root())), ("the interpreter", sys.executable)):
            if not _SAFE.fullmatch(path):
                why = f"deepspeed passes the path of {what} ({path}) through the shells of hosts unquoted"
                yield self.error("kind", why, "move it to a path of plain letters, or set backend=ssh")
        yield from self._unreachable(hosts)
        if self.runner == "slurm" and len({host.slots for host in hosts}) > 1:
            yield self.error("hostfile", "srun needs as many slots on every host", "write the same slots=N everywhere")

    def remote(self, host: Host, module: str) -> RemoteCommand:
        """Return the ssh command that runs ``module``: pdsh and mpirun reach hosts the same way."""
        from launcher.remote.bundle import code_root
        from launcher.remote.command import prologue, ssh_command

        text = prologue(module, cwd=os.getcwd(), pythonpath=(str(code_root()),))  # noqa: PTH109
        return ssh_command(host, prologue=text, config=self.ssh_config)

    def rank_commands(self, hosts: Sequence[Host], identity: RunIdentity) -> Sequence[tuple[str, ...]]:
        """Return what deepspeed starts for each rank of a host."""
        from launcher.supervision.file_channel import encode_run_dir

        return [(host.python, "-u", "-m", _RANK_MODULE, encode_run_dir(identity.run_dir)) for host in hosts]

    def render(self, plan: Plan, *, snapshot: str) -> str:
        """Return the deepspeed command, its environment and its hostfile."""
        from launcher.remote.bundle import code_root

        command = self._command(plan)
        lines = [f"export {name}={shlex.quote(value)}" for name, value in command.env.items()]
        lines += [
            f"cd {code_root()}",
            shlex.join(command.argv),
            f"# {_hostfile_of(plan)}:",
            hostfile_text(plan).rstrip(),
        ]
        lines.append("# board/start.json in the run directory: folder and environment for the ranks, without secrets")
        if plan.forward:
            lines.append(f"# forwarded: {' '.join(name for name in plan.forward if not _is_secret(name))}")
        if kept := _kept_back(plan):
            lines.append(f"# {kept}")
        return "\n".join(lines) + "\n"

    def submit(self, plan: Plan) -> RunOutcome:
        """Run deepspeed below an agent of this machine, which watches the ranks through the run directory."""
        from launcher.protocol.plan import Host, HostPlan
        from launcher.protocol.rundir import RunDir
        from launcher.remote.command import RemoteCommand
        from launcher.supervision.connection import PipeConnection
        from launcher.supervision.file_channel import mark_run_over
        from launcher.supervision.session import run_session
        from launcher.utils.files import write_atomic

        run_dir = RunDir(Path(plan.run_dir))
        write_atomic(Path(_hostfile_of(plan)), hostfile_text(plan))
        if kept := _kept_back(plan):
            print(kept, file=sys.stderr, flush=True)
        here = HostPlan(
            host=Host(name=socket.gethostname().partition(".")[0], slots=plan.world_size, python=sys.executable),
            first_rank=0,
            start=self._command(plan),
            sidecars=plan.hosts[0].sidecars,
        )

        def connect(host: HostPlan) -> PipeConnection:
            argv = (sys.executable, "-m", _AGENT_MODULE)
            return PipeConnection(host.host.name, RemoteCommand(argv=argv), log=run_dir.log_of(host.host.name, "agent"))

        try:
            return run_session(replace(plan, hosts=(here,), forward=()), connect)
        finally:
            mark_run_over(run_dir)

    def _unreachable(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Yield logins that the runner has no word for."""
        for host in hosts:
            if host.login == host.name:
                continue
            if self.runner == "pdsh" and re.fullmatch(r"[^@:\[\]]+@[^@:\[\]]+", host.login):
                continue
            why = f"{self.runner} cannot be told to reach {host.login} under another user, port or IPv6 address"
            fix = "name the host by an alias of your ssh configuration that says so, or set backend=ssh"
            yield ConfigError("backend.hostfile", self.hostfile, why=why, fix=fix)

    def _command(self, plan: Plan) -> Command:
        """Return the deepspeed command line. One host takes the same way as many."""
        from launcher.protocol.plan import Command
        from launcher.remote.bundle import code_root
        from launcher.supervision.file_channel import encode_run_dir

        script = (
            ("--module", _RANK_MODULE)
            if self.runner != "slurm"
            else (str(code_root() / "launcher" / "jobs" / "external_rank.py"),)
        )
        argv = (
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", _hostfile_of(plan)),
            *("--launcher", self.runner, "--force_multi", "--no_ssh_check", "--no_local_rank"),
            *("--master_addr", plan.hosts[0].host.address, "--master_port", str(plan.port)),
            *self._runner_options(plan),
            *script,
            encode_run_dir(plan.run_dir),
        )
        return Command(argv=argv, env=self._env())

    def _runner_options(self, plan: Plan) -> tuple[str, ...]:
        if self.runner == "openmpi":
            words = ["--allow-run-as-root", "--map-by", "slot"]
            words += ["--mca", "plm_rsh_args", shlex.join(self._ssh_options())]
            return (f"--launcher_args={shlex.join(words)}",)
        if self.runner == "slurm":
            names = [host.host.name for host in plan.hosts]
            words = ["--nodes", str(len(names)), "--nodelist", ",".join(names), "--overcommit"]
            words += ["--ntasks-per-node", str(plan.hosts[0].host.slots)]
            return (f"--launcher_args={shlex.join(words)}",)
        return ()

    def _env(self) -> dict[str, str]:
        from launcher.remote.bundle import code_root

        env = {"PYTHONPATH": str(code_root())}
        if self.runner == "pdsh":
            env |= {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": " ".join(self._ssh_options())}
        return env

    def _ssh_options(self) -> list[str]:
        config = ["-F", str(Path(self.ssh_config).absolute())] if self.ssh_config else []
        return [*config, *("-o", "BatchMode=yes", "-o", "ControlPath=none", "-o", "ClearAllForwardings=yes")]


def hostfile_text(plan: Plan) -> str:
    """Return the hostfile that deepspeed gets: the hosts of the plan and no others."""
    return "".join(f"{host.host.login} slots={host.host.slots}\n" for host in plan.hosts)


def _hostfile_of(plan: Plan) -> str:
    return f"{plan.run_dir}/hostfile"


def _kept_back(plan: Plan) -> str:
    """Return what to say of secrets that ranks will miss; the W&B key is used here, where the tracker runs."""
    secrets = [name for name in plan.forward if _is_secret(name) and not name.startswith("WANDB_")]
    if not secrets:
        return ""
    way = "deepspeed can only send them in command lines. Log in on the hosts (hf auth login), or set backend=ssh"
    return f"{', '.join(secrets)} will not reach the hosts: {way}"


def _is_secret(name: str) -> bool:
    return is_secret(name, os.environ.get(name, ""))
