"""Runs, sweeps and benchmarks as one HTML file that needs nothing besides itself."""
