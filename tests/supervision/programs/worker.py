"""A rank with given actions: ``worker.py RUN_DIR``; DO maps a rank to the names of functions below."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launcher.errors import ConfigError, EnvironmentProblem, JobError
from launcher.protocol.rank_env import read_rank_env
from launcher.supervision.rank_monitor import run_rank


def stubborn(env, heartbeat):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def ignore_interrupts(env, heartbeat):
    signal.signal(signal.SIGINT, lambda number, frame: print("interrupted"))


def fork_without_end(env, heartbeat):
    """Leave a chain of processes behind, each of which starts the next one and exits, for a bounded time."""
    chain = "for _ in range(10_000):\n    time.sleep(0.005)\n    if os.fork():\n        os._exit(0)"
    code = f"import os, time\nos.setsid()\n{chain}"
    subprocess.Popen([sys.executable, "-c", code])


def grandchild(env, heartbeat):
    code = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", f"import os\nif os.fork() == 0:\n    {code}"]).wait()


def work(env, heartbeat):
    (env.run_dir.path / f"up.{env.rank}").write_text(str(os.getpid()))
    for step in range(1, 10**6):
        heartbeat.update("forward", step, loss=1 / step)
        time.sleep(0.05)


def up_without_a_step(env, heartbeat):
    (env.run_dir.path / f"up.{env.rank}").write_text(str(os.getpid()))
    heartbeat.update("load")
    time.sleep(600)


def some_steps(env, heartbeat):
    for step in range(1, 4):
        heartbeat.update("forward", step, steps=3, loss=1 / step)
        print(f"step {step}")


def wait_a_moment(env, heartbeat):
    time.sleep(0.7)


def hold_up(env, heartbeat):
    """Stand still in the forward pass of step 2."""
    heartbeat.update("forward", 1)
    heartbeat.update("forward", 2)
    stand_still()


def stand_still():
    time.sleep(600)


def wait_for_others(env, heartbeat):
    """Go on to the collective of step 2 and wait there."""
    heartbeat.update("forward", 2)
    time.sleep(0.3)
    heartbeat.update("backward", 2)
    wait_in_collective()


def wait_in_collective():
    time.sleep(600)


def meet(env, heartbeat):
    """Join the other ranks, with torch."""
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    heartbeat.update("forward", 1)
    sum_over_ranks()


def sum_over_ranks():
    import torch

    torch.distributed.all_reduce(torch.ones(1))


def read_batch(env, heartbeat):
    """Come late to the collective of step 2, and move later than the ranks that are waiting."""
    time.sleep(2)
    heartbeat.update("data", 2)
    time.sleep(600)


def receive(env, heartbeat):
    """Wait for something else than the others do, in step 2, and move later than they."""
    import torch.distributed

    time.sleep(2)
    heartbeat.update("forward", 2)
    torch.distributed.recv(torch.ones(1), src=0)


def freeze(env, heartbeat):
    """Be stopped in step 2, again after each time that something continues this rank."""
    heartbeat.update("forward", 2)
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


def leave(env, heartbeat):
    """End well, though the others still count on this rank."""
    heartbeat.update("forward", 2)
    os._exit(0)


def sum_later(env, heartbeat):
    """The backward pass of step 2."""
    heartbeat.update("forward", 2)
    time.sleep(0.3)
    heartbeat.update("backward", 2)
    sum_over_ranks()


def no_heartbeat(env, heartbeat):
    time.sleep(600)


def value_error(env, heartbeat):
    raise ValueError("a planted mistake, grüße")


def hang_after_error(env, heartbeat):
    """Fail, and not come to an end."""
    import threading

    threading.Thread(target=time.sleep, args=(600,)).start()
    raise ValueError("a planted mistake, grüße")


def connection_error(env, heartbeat):
    raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")


def port_error(env, heartbeat):
    raise RuntimeError("DistNetworkError: the server socket has failed to listen, name: EADDRINUSE")


def job_error(env, heartbeat):
    raise JobError("loss is nan at step 7 on rank 0")


def config_error(env, heartbeat):
    raise ConfigError("run.yaml", why="its hash differs", fix="start the run again")


def environment_problem(env, heartbeat):
    raise EnvironmentProblem("the weights cannot be fetched")


def exit_3(env, heartbeat):
    sys.exit(3)


def exit_75(env, heartbeat):
    sys.exit(75)


def exit_77_at_once(env, heartbeat):
    os._exit(77)


def kill_itself(env, heartbeat):
    print("the last words", end="", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def segfault(env, heartbeat):
    ctypes.string_at(0)


def save_when_cancelled(env, heartbeat):
    def save(number, frame):
        (env.run_dir.path / f"saved.{env.rank}").touch()
        sys.exit(75)

    signal.signal(signal.SIGTERM, save)


def save_slowly_when_preempted(env, heartbeat):
    def save(number, frame):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        time.sleep(1)
        (env.run_dir.path / f"saved.{env.rank}").touch()
        sys.exit(75)

    signal.signal(signal.SIGUSR1, save)


def save_and_hang_when_cancelled(env, heartbeat):
    def save(number, frame):
        if env.rank == 0:
            heartbeat.update("checkpoint", preempted=1.0)
        time.sleep(600)

    signal.signal(signal.SIGTERM, save)


def print_odd_lines(env, heartbeat):
    out = sys.stdout.buffer
    out.write("grüße 你好\n".encode())
    out.write(b"binary \xff\xfe\n")
    out.write(b"bar 1\rbar 2\rbar 3\n")
    out.write(b"x" * 300_000 + b"\n")
    out.write(b"???\n")
    out.flush()
    os.write(1, b"in two ")
    time.sleep(0.3)
    os.write(1, b"pieces\n")
    os.system("echo from a child")
    os.write(2, b"no end")


def print_much(env, heartbeat):
    for number in range(20_000):
        print(f"{number} {'y' * 80}")


def main():
    env = read_rank_env(Path(sys.argv[1]), os.environ)
    names = json.loads(os.environ["DO"])[str(env.rank)].split()

    def do(env, heartbeat):
        for name in names:
            globals()[name](env, heartbeat)

    run_rank(do, env)


main()
