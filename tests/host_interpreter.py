"""What stands for the interpreter on hosts that are namespaces, so that their processes are forked too.

    python -I -S host_interpreter.py SOCKET      with the words of the command line in ``WORDS``, one a line

``forking_hosts.py`` has it run there. It asks a preloading process (``preloading.py``), which forks into the namespaces
of the host with the folder, environment and streams given. It passes on the signals that it gets, ends as the fork
does, and the fork dies with it. Every import counts: it starts for each process that does not fork itself.
"""

import json
import os
import signal
import socket
import sys

WORDS = "HOST_INTERPRETER_WORDS"
"""A variable; the command line must not look like the one that it stands for, which tests find processes by."""

_NAMESPACES = ("pid", "mnt", "uts", "ipc", "net")
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main(address: str) -> None:
    """Have the command in ``WORDS`` forked, and end as it does."""
    words = os.environ.pop(WORDS).split("\n")[:-1]
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = json.dumps({"command": words, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()  # noqa: PTH109
    spaces = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in _NAMESPACES]
    server.sendall(len(request).to_bytes(4, "big"))
    socket.send_fds(server, [b"."], [0, 1, 2, *spaces])
    server.sendall(request)
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _frame: server.send(bytes([number])))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # they end when the fork's do
        os.dup2(nothing, stream)
    code = os.waitstatus_to_exitcode(int(server.recv(16) or 9))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
