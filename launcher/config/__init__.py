"""The configuration of a run: one module a group, Run, composition and snapshot. Imports no torch."""
