"""Fixtures with hosts that are namespaces of this machine: real ssh, real cut cables, real power cuts.

``lab_hosts(3, slots=2)`` starts node1, node2 and node3 and returns the :class:`hostlab.lab.Lab`. They go after the
test, whatever happens to it, also when pytest is killed. ``lab_hosts_of_module`` keeps them for all tests of a file.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hostlab.lab import Lab, up
from hostlab.needs import missing

LabHosts = Callable[..., Lab]

_SHARED = ("HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME")
"""What takes minutes to build is this machine's, as on a cluster with a shared disk."""


@pytest.fixture
def lab_hosts() -> Iterator[LabHosts]:
    """Start hosts for one test."""
    with _labs() as make:
        yield make


@pytest.fixture(scope="module")
def lab_hosts_of_module() -> Iterator[LabHosts]:
    """Start hosts for the tests of one file, which must leave them as they find them."""
    with _labs() as make:
        yield make


@contextlib.contextmanager
def _labs() -> Iterator[LabHosts]:
    if (why := _missing()) is not None:
        pytest.skip(why)
    with contextlib.ExitStack() as at_end:
        reader, writer = os.pipe()
        at_end.callback(os.close, reader)
        at_end.callback(os.close, writer)  # whichever way this process ends, the labs' stdin ends with it

        def make(
            num_hosts: int,
            *,
            prefix: str = "node",
            slots: int = 1,
            has_private_tmp: bool = False,
            environment: dict[str, str] | None = None,
        ) -> Lab:
            folder = Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="lab")))
            shared = {name: os.environ[name] for name in _SHARED if name in os.environ}
            lab = up(
                folder / "lab",
                prefix,
                num_hosts,
                subnet=f"10.{random.randrange(128, 256)}.{random.randrange(256)}",
                slots=slots,
                has_private_tmp=has_private_tmp,
                environment={**shared, **(environment or {})},
                leash=reader,
            )
            at_end.callback(lab.down)
            return lab

        yield make


@cache
def _missing() -> str | None:
    return missing()
