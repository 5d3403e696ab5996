"""Every strategy against one process: which there are, how each takes its steps, and how far they are apart."""
