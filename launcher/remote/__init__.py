"""Reaching the hosts of a run: command lines, bootstrap, code."""
