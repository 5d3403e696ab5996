"""``backend.setup`` as bash runs it: no Slurm needed."""

import subprocess

from launcher.backends.slurm.setup import setup_in_batch_script, setup_on_node


def test_a_line_of_setup_that_fails_ends_the_shell_with_one_message(tmp_path):
    script = "\n".join(
        ["#!/bin/bash", *setup_in_batch_script(("true", 'f() { return 3; }; f "a b"'), on_failure="echo")]
    )
    ended = bash(script)
    message = 'backend.setup: this line ended with exit code 3: f() { return 3; }; f "a b"'
    assert (ended.returncode, ended.stderr) == (69, f"launcher: {message}\n")
    assert ended.stdout == f"--setup-failed {message}\n"
    for line, code in (("exit 0", 0), ("nothing-of-this-name 2>&-", 127), ("false", 1), ("fi", 2)):
        ended = bash("\n".join(setup_in_batch_script((line, "echo never"), on_failure="echo")))
        assert ended.returncode == 69
        assert f"this line ended with exit code {code}: {line}\n" in ended.stderr
        assert "never" not in ended.stdout


def test_setup_on_a_node_leaves_stdin_and_stdout_to_the_agent():
    lines = ("export A=1", "cat", "echo said")
    command = (*setup_on_node(lines), "sh", "-c", 'echo "$A"; cat')
    ended = subprocess.run(command, input="from the session", capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("1\nfrom the session", "said\n")
    ended = subprocess.run((*setup_on_node(("false",)), "echo", "agent"), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (69, "")
    assert ended.stderr == "launcher: backend.setup: this line ended with exit code 1: false\n"


def bash(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
