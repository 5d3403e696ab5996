"""Options that every backend has, and what they refuse."""

import pytest

from launcher.backends.local import Local
from launcher.errors import ConfigErrors


@pytest.mark.parametrize(
    ("option", "value"), [("ranks", 0), ("threads", 0), ("port", 80), ("port", 70000), ("grace_s", -1.0)]
)
def test_impossible_values_are_refused(option, value):
    with pytest.raises(ConfigErrors, match=f"backend.{option}={value}"):
        Local(**{option: value})
