"""What torchrun does, without torch: ``spawner.py RANKS PROGRAM ARGUMENT``.

Starts the ranks, ends the others when one fails, flattens every code to 1, passes on that it was signalled.
"""

import os
import signal
import subprocess
import sys
import time


class SignalException(Exception):
    """One of the signals that torchrun turns into an exception, and passes on."""


def note(number, _frame):
    raise SignalException(f"Process {os.getpid()} got signal: {number}", number)


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, note)
size = int(sys.argv[1])
end_by = signal.SIGTERM
ranks = [
    subprocess.Popen(
        [sys.executable, *sys.argv[2:]],
        env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
        start_new_session=True,
    )
    for rank in range(size)
]
try:
    patient = "PATIENT" in os.environ  # lets the others come to their own end
    while any(rank.poll() is None for rank in ranks) and (patient or not any(rank.poll() for rank in ranks)):
        time.sleep(0.02)
except SignalException as death:
    end_by = death.args[1]
    raise
finally:
    for rank in ranks:
        rank.send_signal(end_by)
    for rank in ranks:
        rank.wait(timeout=30)
sys.exit(int(any(rank.returncode for rank in ranks)))
