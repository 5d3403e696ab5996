"""Options that every backend has, and what they refuse."""

import pytest

from launcher.config.backend.local import LocalBackend
from launcher.errors import ConfigErrors
from launcher.protocol.rundir import RunDir

from .contract import SMALL, ForkedBackendContract


@pytest.mark.parametrize(
    ("option", "value"), [("ranks", 0), ("threads", 0), ("port", 80), ("port", 70000), ("grace_s", -1.0)]
)
def test_impossible_values_are_refused(option, value):
    with pytest.raises(ConfigErrors, match=f"backend.{option}={value}"):
        LocalBackend(**{option: value})


class TestContract(ForkedBackendContract):
    takes_part = ()  # nothing is submitted to a scheduler

    @pytest.fixture
    def words(self):
        return ("backend=local", "backend.ranks=2")

    @pytest.fixture
    def run(self, words, launch):
        return self.starting(launch, words)

    @pytest.fixture
    def failing_run(self, words, launch_forked):
        return self.starting(launch_forked, words)

    def starting(self, launch, words):
        def start(*more):
            ended = launch(*SMALL, *words, *more)
            return ended.returncode, ended.output, RunDir(ended.run_dir)

        return start
