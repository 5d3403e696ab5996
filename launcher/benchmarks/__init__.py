"""Benchmarks of a machine: one file each, and shared modules."""
