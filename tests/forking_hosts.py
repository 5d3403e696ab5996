"""Hosts that are namespaces whose interpreters are forked from a process that has imported torch.

``replace_on`` puts a script in the place of the interpreter of each host. Once there is a preloading process to ask
(``ask``), the script runs ``host_interpreter.py`` for what the launcher starts on hosts; all else gets the real
interpreter.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from . import host_interpreter

_SOCKET = "interpreter.socket"
"""Name of a link to the preloading process's socket, in the folder of a lab."""

_SCRIPT = """\
#!/bin/bash
if [[ -e {socket} ]]; then
  case "$*" in
  "-I -c "* | "-u -m deepspeed.launcher.launch "* | "-u -m launcher.jobs.external_rank "* | \\
    "-m launcher.doctor.probe" | "-m launcher.supervision."* | "-P -m launcher.backends.slurm.entrypoint "*)
    printf -v {words} '%s\\n' "$@"
    export {words}
    exec {real} -I -S {program} {socket}
    ;;
  esac
fi
exec -a {interpreter} {real} "$@"
"""


def replace_on(lab: Any) -> None:
    """Put the script in the place of the interpreter on all hosts of a lab.

    Args:
        lab: anything with ``folder``, ``names`` and ``run``, whose hosts have mount namespaces of their own.
    """
    interpreter = Path(sys.executable)
    programs, originals = lab.folder / "interpreter", lab.folder / "programs"
    programs.mkdir()
    originals.mkdir()
    script = programs / interpreter.name
    words = {"interpreter": interpreter, "real": interpreter.resolve(), "socket": lab.folder / _SOCKET}
    words |= {"program": host_interpreter.__file__, "words": host_interpreter.WORDS}
    script.write_text(_SCRIPT.format(**{name: shlex.quote(str(word)) for name, word in words.items()}))
    script.chmod(0o755)
    for program in interpreter.parent.iterdir():
        if program.name != interpreter.name:
            (programs / program.name).symlink_to(originals / program.name)
    folders = [str(folder) for folder in (interpreter.parent, originals, programs)]
    for name in lab.names:
        done = lab.run(name, ["sh", "-c", 'mount --bind "$1" "$2" && mount --bind "$3" "$1"', "sh", *folders])
        assert done.returncode == 0, done.stderr


def ask(lab: Any, address: Path | None) -> None:
    """Have the hosts ask the preloading process at ``address``, which they see; or start interpreters again."""
    socket_of_lab = lab.folder / _SOCKET
    if address is None:
        socket_of_lab.unlink(missing_ok=True)
    else:
        socket_of_lab.symlink_to(address)
