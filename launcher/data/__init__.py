"""Corpora: where text comes from, how it becomes tokens, and which sample goes where."""
