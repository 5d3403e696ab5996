"""Contracts: checks of every part of one kind, as classes that tests inherit.

Needs pytest. The launcher's own tests inherit the same classes.
"""

import pytest

pytest.register_assert_rewrite(
    *(f"launcher.testing.{name}" for name in ("backend", "data", "model", "optimizer", "plugin", "tracker", "training"))
)
