"""Runs of this folder are forked."""

from tests.forked_runs import launch as launch
from tests.forked_runs import launch_in_background as launch_in_background
