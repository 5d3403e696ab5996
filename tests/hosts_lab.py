"""Fixtures with hosts that are namespaces of this machine: real ssh, real cut cables, real power cuts.

``lab_hosts(3, slots=2)`` starts node1, node2 and node3 and returns the :class:`hostlab.lab.Lab`. They go after the
test, whatever happens to it, also when pytest is killed. ``lab_hosts_of_module`` keeps them for all tests of a file.

``fork_on(lab)`` has what the launcher starts on the hosts forked, for the rest of the test, from a process that has
imported torch (``preloading.py``). A backend keeps one test of a run without it.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hostlab.lab import Lab, up
from hostlab.needs import missing

from . import forking_hosts

LabHosts = Callable[..., Lab]
ForkOn = Callable[..., None]

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


@pytest.fixture
def fork_on(preloading: Any) -> Iterator[ForkOn]:
    """Fork interpreters on the hosts of a lab until the test ends; ``kind`` is one of ``preloading_modules``.

    What counts as a lab: ``forking_hosts.replace_on``.
    """
    with contextlib.ExitStack() as at_end:

        def fork(lab: Any, *, kind: str = "torch") -> None:
            address = lab.folder / "preloading.socket"
            if not address.exists():
                forking_hosts.replace_on(lab)
                preloading.listen(address, kind=kind)
            forking_hosts.ask(lab, address)
            at_end.callback(forking_hosts.ask, lab, None)

        yield fork


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
