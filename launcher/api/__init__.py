"""The Python API: compose, plan and run from scripts and notebooks."""
