"""Profiling and timing on ranks."""
