"""YAML of manifests, as Go's parsers read it: they take more texts for numbers than PyYAML does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.backends.kubernetes.manifest_parts import manifest_text

KUBECTL = shutil.which("kubectl") or shutil.which("kubectl", path=str(Path(sys.executable).parent))
AMBIGUOUS = (
    *("1e3", "3e8", "1E+3", "0o17", "-0o17", "0b11", "0x1F", "017", "08", "1_000", "_1", ".5", ".5e1", "5.", "1.5"),
    *("-1", "+1", "1,000", "12:30:45", "1:2", "2001-12-14", "2001-12-14t21:59:43.10-05:00", ".inf", "-.INF", ".NaN"),
    *("y", "N", "yes", "no", "On", "OFF", "true", "False", "null", "Null", "~", "", "=", "<<", "inf", "NaN"),
)
PLAIN = ("v1", "16Gi", "300s", "1h30m", "e3", "registry/a:1.2", "kubernetes.io/hostname", "nvidia.com/gpu")


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_a_text_that_a_parser_could_read_as_something_else_is_quoted(text: str) -> None:
    assert manifest_text({"a": text, "list": [text]}) == f"a: '{text}'\nlist:\n- '{text}'\n"
    if text:  # an empty key takes two lines
        assert manifest_text({text: "b"}) == f"'{text}': b\n"


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_have_no_quotes(text: str) -> None:
    assert manifest_text({"a": text}) == f"a: {text}\n"


def test_numbers_and_truth_values_stay_what_they_are() -> None:
    values = {"a": 1, "b": 2.5, "c": True, "d": None, "e": "several\nlines\n"}
    text = manifest_text(values)
    assert not re.search("['\"]", text)
    assert yaml.safe_load(text) == values


@pytest.mark.skipif(KUBECTL is None, reason="needs kubectl")
def test_kubectl_reads_each_text_as_it_was() -> None:
    data = {f"k{number}": text for number, text in enumerate((*AMBIGUOUS, *PLAIN))}
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": data}
    argv = [str(KUBECTL), "label", "--local", "--filename=-", "--output=json", "x=y"]
    done = subprocess.run(argv, input=manifest_text(manifest), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"] == data
