"""Names: what a cluster takes, and what is kept of a user's own."""

import re

import pytest

from launcher.backends.kubernetes.manifest_parts import escape_references
from launcher.backends.kubernetes.pod_config import job_name, pod_address
from launcher.config.kubernetes_objects import parse_quantity

from .cluster import expand

RUN_ID = "20260101-120000-abcd"
NAMES = ("gpt2_tiny", "A", "7b", "größe", "日本", "", "-", "x" * 300, "a.b/c d", "-a-", "Zero3 GPT2-XL")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_dns_labels_also_as_host_names_of_pods(name):
    job = job_name(name, RUN_ID)
    assert job.endswith(RUN_ID)
    for workload in ("indexed_job", "jobset", "pytorchjob", "trainjob"):
        host = pod_address(workload, job, 99999).partition(".")[0]
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", host), host


def test_names_say_whose_they_are():
    assert job_name("Zero3 GPT2-XL", RUN_ID) == f"zero3-gpt2-xl-{RUN_ID}"
    assert job_name("7b", RUN_ID) == f"run-7b-{RUN_ID}"
    assert job_name("日本", RUN_ID) == f"run-{RUN_ID}"


@pytest.mark.parametrize(
    ("text", "size"),
    [("64Gi", 64 * 2**30), ("1k", 1000), ("500M", 5 * 10**8), ("12", 12), ("2Ki", 2048)]
    + [(text, None) for text in ("", "1.5Gi", "Gi", "64GB", "-1Gi", "0", "1e3", "4 Gi")],
)
def test_amounts_of_memory(text, size):
    assert parse_quantity(text) == size


@pytest.mark.parametrize(
    "word", ["$(HOME)", "$$(HOME)", "$", "a$b", "$$", "$((HOME))", "${HOME}", "x$(HOME", "ü $(A)$"]
)
def test_words_arrive_as_they_are(word):
    assert expand(escape_references(word), {"HOME": "/root", "A": "b"}) == word
    assert expand("$(HOME)", {"HOME": "/root"}) == "/root"
