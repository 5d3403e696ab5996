"""The life of a run: prepare, probe, submit, restart, finish; sweeps of runs."""
