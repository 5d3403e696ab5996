"""Entry, context and executor registry of the jobs on ranks."""
