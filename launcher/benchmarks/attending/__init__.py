"""Parts of the benchmark of attention: its points, its processes, its report."""
