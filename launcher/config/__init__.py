"""The configuration of a run: one module per group, Run, composition, snapshot; no torch."""
