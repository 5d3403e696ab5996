"""No file that others wrote runs code when it is loaded; one that is damaged is named."""

import os
from pathlib import Path

import pytest
import torch

from launcher.engines.checkpoint_io import load_file
from launcher.errors import EXIT_BAD_INPUT, JobError


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.fixture
def hostile(tmp_path):
    """A file that makes the folder ``made`` where it is unpickled in full."""
    torch.save({"state": Hostile(tmp_path / "made"), "tensor": torch.zeros(1)}, tmp_path / "foreign.pt")
    yield tmp_path / "foreign.pt"
    assert not (tmp_path / "made").exists(), "the file ran code"


def test_a_file_that_would_run_code_is_refused_and_named(hostile):
    with pytest.raises(JobError, match=r"foreign\.pt holds an object of posix\.mkdir, which could run code") as error:
        load_file(hostile)
    assert error.value.exit_code == EXIT_BAD_INPUT


def test_tensors_and_plain_values_are_read(tmp_path):
    torch.save({"step": 3, "weight": torch.ones(2)}, tmp_path / "foreign.pt")
    found = load_file(tmp_path / "foreign.pt")
    assert (found["step"], found["weight"].tolist()) == (3, [1.0, 1.0])


@pytest.mark.parametrize("content", [b"", b"nothing of torch's", b"PK\x03\x04 half a zip", b"\x80\x02."])
def test_a_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "optimizer.pt"
    file.write_bytes(content)
    with pytest.raises(JobError, match=r"optimizer\.pt") as error:
        load_file(file)
    assert error.value.exit_code == EXIT_BAD_INPUT
