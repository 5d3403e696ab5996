"""The contract of backends in these tests: what runs share is computed once, in forked processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.protocol.rundir import RunDir
from launcher.testing import backend
from launcher.testing.backend import SMALL as SMALL
from launcher.testing.backend import Ended as Ended
from launcher.testing.backend import losses
from tests.conftest import Launch, MadeOnce


class ForkedBackendContract(backend.BackendContract):
    """Tests of one of the launcher's backends; a subclass gives the fixtures ``words`` and ``run``."""

    @pytest.fixture
    def losses_of_one_machine(self, made_once: MadeOnce, launch_forked: Launch) -> dict[int, float]:
        """Return the losses that two ranks of this machine come to; they compute once for all backends."""

        def fill(folder: Path) -> None:
            launch_forked(*SMALL, "backend=local", "backend.ranks=2", "run.dir=near", cwd=folder).expect(0)

        found = losses(RunDir(made_once("one_machine", fill) / "near"))
        assert len(found) == 6
        return found
