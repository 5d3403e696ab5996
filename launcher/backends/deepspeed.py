"""Executor of ``backend=deepspeed``: the real ``deepspeed`` command with a hostfile.

It works around defects of that command. The hostfile always exists, because without one deepspeed runs on this machine.
Its only argument holds no character that a shell changes. It gets no variables to export, because it quotes them
wrongly. Its exit code does not decide the outcome. Ranks read everything else from the run directory, and are
supervised through it.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from dataclasses import replace
from pathlib import Path

from launcher.config.backend.deepspeed import DeepspeedBackend
from launcher.errors.secrets import is_secret
from launcher.execution.executor import Executor
from launcher.planning.commands import EXTERNAL_RANK_MODULE
from launcher.plugins.loading import path_environment
from launcher.protocol.outcome import RunOutcome
from launcher.protocol.plan import Command, Host, HostPlan, Plan
from launcher.protocol.rundir import RunDir, encode_run_dir
from launcher.remote.command import RemoteCommand, prologue, ssh_command
from launcher.utils.files import write_atomic
from launcher.utils.system import code_root

_AGENT_MODULE = "launcher.supervision.external_launcher"


class DeepspeedExecutor(Executor[DeepspeedBackend]):
    """Starts ranks with ``deepspeed --hostfile``, in a run directory that all hosts share."""

    def remote_command(self, host: Host, module: str) -> RemoteCommand:
        """Return the ssh command that runs ``module``: pdsh and mpirun reach hosts the same way."""
        text = prologue(module, cwd=os.getcwd(), pythonpath=(str(code_root()),), env=path_environment(self.plugins))  # noqa: PTH109
        return ssh_command(host, prologue=text, config=self.backend.ssh_config)

    def render(self, plan: Plan, *, snapshot: str) -> str:
        """Return the deepspeed command, its environment and its hostfile."""
        command = self._command(plan)
        lines = [f"export {name}={shlex.quote(value)}" for name, value in command.env.items()]
        lines += [
            f"cd {code_root()}",
            shlex.join(command.argv),
            f"# {_hostfile_path(plan)}:",
            render_hostfile(plan).rstrip(),
        ]
        lines.append("# channel/start.json in the run directory: folder and environment for the ranks, without secrets")
        if plan.forwarded_env:
            lines.append(f"# forwarded: {' '.join(name for name in plan.forwarded_env if not _is_secret(name))}")
        if warning := _unsent_secrets(plan):
            lines.append(f"# {warning}")
        return "\n".join(lines) + "\n"

    def submit(self, plan: Plan) -> RunOutcome:
        """Run deepspeed under an agent on this machine, and return the outcome of the run.

        The agent supervises the ranks through the run directory.
        """
        from launcher.supervision.connection import PipeConnection  # printing a plan imports no session
        from launcher.supervision.file_channel import mark_run_over
        from launcher.supervision.session import run_session

        run_dir = RunDir(Path(plan.run_dir))
        write_atomic(Path(_hostfile_path(plan)), render_hostfile(plan))
        if warning := _unsent_secrets(plan):
            print(warning, file=sys.stderr, flush=True)
        here = HostPlan(
            host=Host(name=socket.gethostname().partition(".")[0], slots=plan.world_size, python=sys.executable),
            first_rank=0,
            agent_command=self._command(plan),
            sidecars=plan.hosts[0].sidecars,
        )

        def connect(host: HostPlan) -> PipeConnection:
            argv = (sys.executable, "-m", _AGENT_MODULE)
            remote = RemoteCommand(argv=argv, env=path_environment(self.plugins))
            return PipeConnection(host.host.name, remote, log=run_dir.log_of(host.host.name, "agent"))

        try:
            of_here = replace(plan, hosts=(here,), forwarded_env=())
            return run_session(of_here, connect, on_first_step=self.on_first_step)
        finally:
            mark_run_over(run_dir)

    def _command(self, plan: Plan) -> Command:
        """Return the deepspeed command line; it is the same for one host as for many."""
        script = (
            ("--module", EXTERNAL_RANK_MODULE)
            if self.backend.runner != "slurm"
            else (str(code_root() / "launcher" / "jobs" / "external_rank.py"),)
        )
        argv = (
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", _hostfile_path(plan)),
            *("--launcher", self.backend.runner, "--force_multi", "--no_ssh_check", "--no_local_rank"),
            *("--master_addr", plan.hosts[0].host.address, "--master_port", str(plan.port)),
            *self._runner_options(plan),
            *script,
            encode_run_dir(plan.run_dir),
        )
        return Command(argv=argv, env=self._env())

    def _runner_options(self, plan: Plan) -> tuple[str, ...]:
        if self.backend.runner == "openmpi":
            words = ["--allow-run-as-root", "--map-by", "slot"]
            words += ["--mca", "plm_rsh_args", shlex.join(self._ssh_options())]
            return (f"--launcher_args={shlex.join(words)}",)
        if self.backend.runner == "slurm":
            names = [host.host.name for host in plan.hosts]
            words = ["--nodes", str(len(names)), "--nodelist", ",".join(names), "--overcommit"]
            words += ["--ntasks-per-node", str(plan.hosts[0].host.slots)]
            return (f"--launcher_args={shlex.join(words)}",)
        return ()

    def _env(self) -> dict[str, str]:
        env = {"PYTHONPATH": str(code_root())}
        if self.backend.runner == "pdsh":
            env |= {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": " ".join(self._ssh_options())}
        return env

    def _ssh_options(self) -> list[str]:
        config = self.backend.ssh_config
        file = ["-F", str(Path(config).absolute())] if config else []
        return [*file, *("-o", "BatchMode=yes", "-o", "ControlPath=none", "-o", "ClearAllForwardings=yes")]


def render_hostfile(plan: Plan) -> str:
    """Return the hostfile for deepspeed: the hosts of the plan and no others."""
    return "".join(f"{host.host.ssh_destination} slots={host.host.slots}\n" for host in plan.hosts)


def _hostfile_path(plan: Plan) -> str:
    return f"{plan.run_dir}/hostfile"


def _unsent_secrets(plan: Plan) -> str:
    """Return a warning about secrets that ranks do not get.

    Those of W&B and MLflow are not among them: they are used here, where the tracker runs.
    """
    secrets = [name for name in plan.forwarded_env if _is_secret(name) and not name.startswith(("WANDB_", "MLFLOW_"))]
    if not secrets:
        return ""
    fix = "deepspeed can only send them in command lines. Log in on the hosts (hf auth login), or set backend=ssh"
    return f"{', '.join(secrets)} will not reach the hosts: {fix}"


def _is_secret(name: str) -> bool:
    return is_secret(name, os.environ.get(name, ""))
