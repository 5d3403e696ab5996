"""What a container runtime does before the command of a container runs: mounts, host name, names of the others.

``python sandbox.py SPEC``, a JSON file: the container is the only child of this process, the first one of new mount,
UTS and PID namespaces. Where this process is a fork (tests/preloading.py) the container is forked as well.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

_NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x20000000  # CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWPID
_PR_SET_PDEATHSIG = 1


def mount(*words):
    subprocess.run(["mount", *words], check=True)


def main():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NAMESPACES) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    child = os.fork()
    if child == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        contain()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def contain():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a pod deleted this early never starts its container
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    mount("--make-rprivate", "/")
    mount("-t", "proc", "proc", "/proc")
    mount("-t", "tmpfs", "tmpfs", "/run")  # in this namespace alone, so that folders can be made there
    kept = {f"/run/shared{number}": path for number, path in enumerate(spec["shared"])}
    for place, path in kept.items():
        Path(place).mkdir()
        mount("--bind", path, place)
    for volume in sorted(spec["mounts"], key=lambda volume: volume["path"] != "/tmp"):
        path = Path(volume["path"])
        path.mkdir(parents=True, exist_ok=True)
        if volume["source"] is None:
            mount("-t", "tmpfs", "tmpfs", str(path))
        else:
            mount("--bind", volume["source"], str(path))
            if volume["is_read_only"]:
                mount("-o", "remount,bind,ro", str(path))
        if volume["path"] == "/tmp":
            for place, shared in kept.items():  # some are below it
                Path(shared).mkdir(parents=True, exist_ok=True)
                mount("--bind", place, shared)
    mount("--bind", spec["hosts"], "/etc/hosts")
    if spec["is_read_only"]:
        mount("-o", "remount,bind,ro", "/")
        assert os.statvfs("/").f_flag & os.ST_RDONLY
    subprocess.run(["hostname", spec["hostname"]], check=True)
    os.chdir(spec["cwd"])
    os.execve(spec["command"][0], spec["command"], spec["env"])


main()
