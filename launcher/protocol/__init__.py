"""Formats shared by both wings: names in a run directory, records, messages."""
