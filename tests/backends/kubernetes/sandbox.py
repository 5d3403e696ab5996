"""What a container runtime does before the command of a container runs: mounts, host name, names of the others.

Runs as the first process of new mount, UTS and PID namespaces: ``python sandbox.py SPEC``, a JSON file.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def mount(*words):
    subprocess.run(["mount", *words], check=True)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a pod deleted this early never starts its container
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    mount("-t", "tmpfs", "tmpfs", "/run")  # in this namespace alone, so that folders can be made there
    for volume in spec["mounts"]:
        path = Path(volume["path"])
        path.mkdir(parents=True, exist_ok=True)
        if volume["source"] is None:
            mount("-t", "tmpfs", "tmpfs", str(path))
        else:
            mount("--bind", volume["source"], str(path))
            if volume["is_read_only"]:
                mount("-o", "remount,bind,ro", str(path))
    mount("--bind", spec["hosts"], "/etc/hosts")
    subprocess.run(["hostname", spec["hostname"]], check=True)
    os.chdir(spec["cwd"])
    os.execvpe(spec["command"][0], spec["command"], spec["env"])


main()
