"""The benchmark group: options of all benchmarks, in plain Python."""
