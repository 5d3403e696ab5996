"""The benchmark group: what is measured, in plain Python."""
