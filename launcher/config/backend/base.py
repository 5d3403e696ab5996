"""Options of every backend, and forwarding of environment variables.

Forwarding is an allow-list: a variable that no pattern names is not sent. A host has an environment of its own, and
most of what a shell holds (PATH, HOME, DISPLAY, SSH_AUTH_SOCK) is right on one machine only. Left out on purpose:

- CUDA_VISIBLE_DEVICES: counts the devices of one machine; the plan sets it for each host.
- PET_*: torchrun takes each as one of its own options, whatever the plan says.
- WANDB_SERVICE: the socket of a W&B service on this machine.
- DS_ENV_FILE: where the deepspeed command finds a file on this machine.
- LANG, LC_*: a locale that is not installed on the host costs warnings; ssh has SendEnv to send a user's own.
- LD_LIBRARY_PATH: other machines have other libraries; ``backend.forward`` takes it where they are alike.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from launcher.config.component import Component
from launcher.errors import ConfigError
from launcher.errors.secrets import is_secret
from launcher.protocol.plan import Host, MemoryEstimate, host_ram
from launcher.utils.text import bytes_text, counted


@dataclass(frozen=True, kw_only=True)
class Backend(Component):
    """Where and how a run's processes start.

    ``launcher.backends.registry`` names the executor of each kind.
    """

    group: ClassVar[str] = "backend"

    probes_hosts: ClassVar[bool] = False
    """Whether hosts are other machines, which are probed before a start.
    A dry run knows only their names."""

    is_detached: ClassVar[bool] = False
    """Whether a process started elsewhere executes the run and writes to its directory."""

    restarts_itself: ClassVar[bool] = False
    """Whether the cluster restarts the run itself; the submitting process then does not."""

    shares_paths: ClassVar[bool] = True
    """Whether a path in an option is the same file on the hosts as on this machine."""

    ranks: int | Literal["auto"] = "auto"
    """Ranks on each host; ``auto`` takes the hostfile's count, else one per visible GPU.
    Without GPUs, ``auto`` is 2 if there are two cores; never more than the job has work for."""

    agent: Literal["torchrun", "deepspeed"] = "torchrun"
    """Which launcher starts the ranks of one host."""

    port: int | Literal["auto"] = "auto"
    """Port of the rendezvous; ``auto`` finds a free one for each run.
    If that port is in use when the ranks start, another one is taken."""

    threads: int | Literal["auto"] = "auto"
    """OMP_NUM_THREADS of each rank; ``auto`` shares the cores of the host among its ranks."""

    env: dict[str, str] = field(default_factory=dict)
    """Environment variables added to every rank."""

    show_ranks: tuple[int, ...] | Literal["all"] = "all"
    """Ranks whose output is shown; logs hold every rank's."""

    stall_timeout_s: float = 600.0
    """Seconds without progress after which stacks are dumped and the run ends; 0 disables it.
    A host that neither gets ready nor starts its ranks ends the run after the same time, at least 60 s."""

    grace_s: float | None = None
    """Seconds between the signal to the ranks, after Ctrl-C or SIGTERM, and SIGKILL.
    ``null`` is 7, and 30 after SIGTERM for jobs that save a checkpoint then, as of Kubernetes and Slurm."""

    preempt_grace_s: float = 60.0
    """The same after SIGUSR1, by which schedulers preempt a run that will be resumed."""

    restarts: int = 0
    """How often a failed run is restarted from its newest checkpoint."""

    def sees_files_of_hosts(self, run_dir: str) -> bool:
        """Return whether this process sees the hosts' files: same paths, or it runs on a host."""
        return self.shares_paths or self.run_dir_on_hosts(run_dir) == run_dir

    def run_dir_on_hosts(self, run_dir: str) -> str:
        """Return where hosts keep a run that this machine keeps in ``run_dir``."""
        return run_dir

    @property
    def writable_folders(self) -> tuple[str, ...] | None:
        """Folders of the hosts that ranks may write below; ``None`` for any."""
        return None

    @property
    def rank_launcher(self) -> str:
        """Which command lines of ``launcher.planning.commands`` start the ranks of a host."""
        return self.agent

    @property
    def heartbeat_timeout_s(self) -> float:
        """Silence after which a host counts as lost; 0 where its end is always noticed."""
        return 0.0

    def forwards(self, environ: Mapping[str, str]) -> tuple[str, ...]:
        """Return the variables of ``environ`` that hosts get; local ranks inherit all of them."""
        return ()

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts and times that cannot be."""
        yield from self.validate_minimum(1, "ranks", "threads")
        yield from self.validate_minimum(0, "stall_timeout_s", "grace_s", "preempt_grace_s", "restarts")
        if self.port != "auto" and not 1024 <= self.port <= 65535:
            yield self.error("port", "must lie between 1024 and 65535", "set backend.port=auto")

    @abstractmethod
    def hosts(self, *, max_ranks: int | None) -> tuple[Host, ...]:
        """Return the hosts in the order of ranks, without using the network.

        Args:
            max_ranks: most ranks that the strategy can use, where it has a limit.

        Raises:
            ConfigErrors: the hosts cannot be determined (a bad hostfile).
        """

    def min_hosts_for_restart(self, begun: int) -> int:
        """Return with how few hosts a run that began on ``begun`` may be restarted."""
        return begun

    def validate_hosts(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Yield an error for each option that this backend does not support on ``hosts``."""
        yield from ()

    def sized_hosts(self, hosts: Sequence[Host], memory: MemoryEstimate | None) -> Sequence[Host]:
        """Return ``hosts`` with the RAM that a cluster reserves, where the estimate decides it."""
        return hosts

    def validate_memory(self, hosts: Sequence[Host], memory: MemoryEstimate | None) -> Iterator[ConfigError]:
        """Yield an error if the RAM that a cluster is asked for is less than the estimate."""
        yield from ()


DEFAULT_GLOBS = (
    *("NCCL_*", "GLOO_*", "UCX_*", "FI_*"),  # networks
    *("CUDA_*", "PYTORCH_*", "TORCH_*", "TORCHDYNAMO_*", "TORCHINDUCTOR_*", "TRITON_*", "DS_*"),
    *("OMP_*", "MKL_*", "KMP_*", "GOMP_*", "OPENBLAS_*"),
    *("HF_*", "HUGGING_FACE_*", "HUGGINGFACE_*", "TRANSFORMERS_*", "TOKENIZERS_*", "WANDB_*", "MLFLOW_*"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""Names that every shell takes; not exported functions (``BASH_FUNC_x%%``)."""
_NEVER = ("CUDA_VISIBLE_DEVICES", "PET_*", "WANDB_SERVICE", "DS_ENV_FILE", "LAUNCHER_*")
_BUT = ("LAUNCHER_API_KEYS",)
"""Exceptions to ``_NEVER``: the keys that clients of ``job=serve`` send."""


def forwarded_env(environ: Mapping[str, str], globs: Iterable[str]) -> dict[str, str]:
    """Return the environment variables that hosts get, secrets included.

    They may travel over stdin and must not be written anywhere.

    Args:
        environ: of the process that launches.
        globs: as for file names, case-sensitive; ``DEFAULT_GLOBS`` and what the user adds.
    """
    patterns = tuple(globs)
    return {
        name: value
        for name, value in sorted(environ.items())
        if _VARIABLE.fullmatch(name) and (name in _BUT or (_matches(name, patterns) and not _matches(name, _NEVER)))
    }


def forwarded_names(environ: Mapping[str, str], globs: Iterable[str]) -> tuple[str, ...]:
    """Return the names alone, for plans."""
    return tuple(forwarded_env(environ, globs))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


LEAST_MEMORY_BYTES = 256 << 20
"""Least memory of a host: torch alone needs more."""

PROCESS_BYTES = 2 << 30
"""Interpreter, torch and buffers of one rank, beside its model state."""
_LAUNCHER_BYTES = 1 << 30
"""The launcher's own processes on a host, and its sidecars."""


def needed_ram(host: Host, memory: MemoryEstimate) -> int:
    """Return the bytes of RAM that a run needs on ``host``.

    They are model state, copies for checkpoints and processes. Activations of ranks on CPUs come on top.
    """
    state = host_ram(host, memory.per_rank) + host.slots * memory.checkpoint_copies
    return state + host.slots * PROCESS_BYTES + _LAUNCHER_BYTES


def requested_ram(host: Host, memory: MemoryEstimate) -> int:
    """Return the bytes of RAM to ask a cluster for; a quarter more for ranks on the CPU.

    The quarter is for activations, which the estimate leaves out.
    """
    needed = needed_ram(host, memory)
    return needed if host.devices else needed + needed // 4


def needed_ram_text(host: Host, memory: MemoryEstimate) -> str:
    """Return that sum in words."""
    copies = f" with copies for checkpoints ({bytes_text(host.slots * memory.checkpoint_copies)})"
    state = host_ram(host, memory.per_rank) + host.slots * memory.checkpoint_copies
    return (
        f"{bytes_text(state)} of model state{copies if memory.checkpoint_copies else ''}, {bytes_text(PROCESS_BYTES)} "
        f"for each of {counted(host.slots, 'rank')}, and {bytes_text(_LAUNCHER_BYTES)} for the launcher"
    )


def plausible_memory(amount: str, unit: str) -> str:
    """Return the memory probably meant by an amount far too small: its number, in ``unit``."""
    digits = amount.rstrip("KMGTki")
    return f"{digits if digits.isdigit() and 0 < int(digits) <= 4096 else 16}{unit}"


_RESERVED_ENV = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"})


def validate_env(env: Mapping[str, str], *, forward: Sequence[str] | None = None) -> Iterator[ConfigError]:
    """Yield an error for each invalid, secret or reserved variable in ``backend.env``.

    A name is invalid if no shell takes it. Plans are written to disk, so they must not hold secrets.

    Args:
        env: the variables.
        forward: globs of ``backend.forward``, where the backend has other hosts than this machine.
    """
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name):
            why = f"{name!r} is not a valid name of a variable: use letters, digits and _, and no digit first"
            fix = f"write backend.env.{re.sub(r'[^A-Za-z0-9_]', '_', re.sub(r'^(?=[0-9]|$)', '_', name))}=<value>"
            yield ConfigError("backend.env", why=why, fix=fix if name.strip() else "give it a name, or leave it out")
        elif "\0" in value:
            yield ConfigError(f"backend.env.{name}", why="holds a NUL character", fix="remove the character")
        elif is_secret(name, value):
            fix = f"leave it out and export the variable {name} in your shell: ranks inherit it, and no file holds it"
            if forward is not None and not forwarded_names({name: value}, (*DEFAULT_GLOBS, *forward)):
                fix += f"; add backend.forward=[{','.join((*forward, name))}], which sends it to the hosts"
            yield ConfigError(f"backend.env.{name}", why="looks like a secret, and plans are written to disk", fix=fix)
        elif name in _RESERVED_ENV or name.startswith("LAUNCHER_"):
            fix = "leave it out" if name != "CUDA_VISIBLE_DEVICES" else "set it in your shell, and the plan will use it"
            yield ConfigError(f"backend.env.{name}", why="is set by the launcher", fix=fix)
