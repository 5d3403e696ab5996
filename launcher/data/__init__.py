"""Corpora: sources of text, tokenisation, and the order of samples."""
