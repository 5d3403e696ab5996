"""Reading stacks: the line that is ours, and the collective it waits in."""

import faulthandler
import tempfile
import threading
import traceback

import pytest

from launcher.supervision.stack_dump import StackTrace, read_dump, read_traceback

SITE = "/home/me/venv/lib/python3.11/site-packages"
STDLIB = "/usr/lib/python3.11"
C10D = f"{SITE}/torch/distributed/distributed_c10d.py"
WRAPPED = (f"{SITE}/torch/distributed/c10d_logger.py", 83, "wrapper")


def dump(*threads):
    """Return what faulthandler writes of threads, each a list of frames, the last one the current."""
    blocks = []
    for number, frames in enumerate(threads):
        name = "Current thread" if number == len(threads) - 1 else "Thread"
        lines = [f'  File "{file}", line {line} in {function}' for file, line, function in frames]
        blocks.append("\n".join([f"{name} 0x00007f{number:06x} (most recent call first):", *lines]))
    return "\n\n".join(blocks) + "\n"


LOOP = ("/src/launcher/training/trainer.py", 88, "train_step")


@pytest.mark.parametrize(
    ("frames", "where", "collective"),
    [
        ([LOOP], "launcher/training/trainer.py:88 in train_step", ""),
        ([("/me/train.py", 41, "read_batch"), ("/me/train.py", 90, "main")], "train.py:41 in read_batch", ""),
        (
            [(f"{SITE}/launcher/jobs/rank.py", 1, "f"), LOOP],
            "launcher/jobs/rank.py:1 in f",
            "",
        ),  # installed, not a checkout
        (
            [("/src/launcher/launcher/jobs/rank.py", 1, "f"), LOOP],
            "launcher/jobs/rank.py:1 in f",
            "",
        ),  # a clone of that name
        ([("/src/launcher/tests/worker.py", 1, "f"), LOOP], "worker.py:1 in f", ""),  # beside the package in that clone
        ([("/home/me/launcher/my_loss.py", 1, "f"), LOOP], "my_loss.py:1 in f", ""),  # a user's own folder
        ([(f"{STDLIB}/ssl.py", 1, "read"), (f"{SITE}/x/y.py", 2, "z"), ("/me/t.py", 3, "f")], "t.py:3 in f", ""),
        ([(C10D, 2, "all_reduce"), WRAPPED, ("/me/t.py", 3, "f")], "t.py:3 in f", "all_reduce"),
        # of one collective made of others, the one that was called
        ([(C10D, 1, "all_gather"), WRAPPED, (C10D, 2, "all_gather_object"), LOOP], None, "all_gather_object"),
        ([(C10D, 1, "_store_based_barrier"), (C10D, 2, "init_process_group"), LOOP], None, "init_process_group"),
        ([(f"{SITE}/deepspeed/comm/comm.py", 1, "barrier"), LOOP], None, "barrier"),
        ([(f"{SITE}/torch/autograd/graph.py", 1, "_engine_run_backward"), LOOP], None, "backward"),
        # a hook of ours within the backward pass is not waiting
        ([("/me/t.py", 3, "hook"), (f"{SITE}/torch/autograd/graph.py", 1, "_engine_run_backward")], None, ""),
        # a collective further out, in which our callback hangs
        ([("/me/t.py", 3, "callback"), (C10D, 2, "all_reduce"), LOOP], "t.py:3 in callback", ""),
        ([("/src/launcher/engines/distributed.py", 117, "total"), LOOP], None, "all_reduce"),
        ([("<frozen runpy>", 88, "_run_code"), (f"{STDLIB}/x.py", 1, "f")], "<frozen runpy>:88 in _run_code", ""),
    ],
)
def test_place(frames, where, collective):
    stack = read_dump(dump(frames))
    assert stack.collective == collective
    assert where is None or stack.where == where


def test_the_main_thread_counts():
    other = [(C10D, 2, "all_reduce"), ("/me/other.py", 1, "loop")]
    assert read_dump(dump(other, [LOOP])).where == "launcher/training/trainer.py:88 in train_step"
    without_current = dump(other, [LOOP]).replace("Current thread", "Thread")
    assert read_dump(without_current).where == "launcher/training/trainer.py:88 in train_step"


def test_lines_of_others_in_between_and_an_earlier_dump():
    text = dump([("/me/old.py", 1, "f")]) + "step 3  loss 4.2\n" + dump([LOOP]).replace("\n", "\nnoise\n")
    assert read_dump(text).where == "launcher/training/trainer.py:88 in train_step"


def test_no_answer():
    assert read_dump("", is_stopped=True) == StackTrace(text="", is_stopped=True)
    assert read_dump("").place == ""


def test_what_faulthandler_writes_today():
    hold = threading.Event()
    thread = threading.Thread(target=hold.wait)
    thread.start()
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read().decode()
    hold.set()
    thread.join()
    assert text.count("(most recent call first)") >= 2  # other tests may have left a thread of some library
    assert read_dump(text).where.startswith("test_stacks.py:")
    assert read_dump(text).where.endswith("in test_what_faulthandler_writes_today")


def test_a_traceback():
    def fail():
        raise ValueError("x")

    try:
        fail()
    except ValueError:
        text = traceback.format_exc()
    line = fail.__code__.co_firstlineno + 1
    assert read_traceback(text).where == f"test_stacks.py:{line} in fail"
    caused = (
        f'Traceback (most recent call last):\n  File "/me/t.py", line 3, in f\n  File "{C10D}", line 2, in barrier\n'
    )
    assert (read_traceback(caused).where, read_traceback(caused).collective) == ("t.py:3 in f", "barrier")
