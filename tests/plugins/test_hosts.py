"""The example plugin on two hosts that lack it: sent with the code, or refused before anything starts."""

from __future__ import annotations

from typing import Any

from tests.conftest import Launch
from tests.plugins.conftest import EXAMPLE

SMALL = (
    "+exp=example",
    "job.steps=2",
    "job.eval_every=0",
    "job.sample_tokens=0",
    "data.up_to=6000",
    "backend.threads=1",
)


def test_two_hosts_get_it_with_the_code_or_are_refused(lab_hosts: Any, launch: Launch) -> None:
    lab = lab_hosts(2, has_private_tmp=True, environment={"XDG_CACHE_HOME": "/tmp/cache"})
    words = ["plugins=[launcher_example]", *SMALL, "backend=ssh", f"backend.hostfile={lab.hostfile}"]
    words += [f"backend.ssh_config={lab.ssh_config}", "checkpoint.every=0", "checkpoint.at_end=false"]
    env = {"PYTHONPATH": str(EXAMPLE)}
    hidden = lab.run("node2", ["mount", "-t", "tmpfs", "none", str(EXAMPLE)])
    assert hidden.returncode == 0, hidden.stderr
    ended = launch(*words, "run.dir=refused", env=env).expect(69)
    assert "node2: the plugin launcher_example, which the run uses, cannot be loaded by" in ended.output
    assert "there is no module launcher_example in this environment or in the current folder" in ended.output
    assert "backend.code=sent" in ended.output
    assert not (ended.cwd / "refused").exists()
    ended = launch(*words, "backend.code=sent", "run.dir=sent", env=env).expect(0)
    assert "callback/weight_norm" in (ended.cwd / "sent" / "metrics.jsonl").read_text()
    assert len((ended.cwd / "sent" / "losses.csv").read_text().splitlines()) == 3
