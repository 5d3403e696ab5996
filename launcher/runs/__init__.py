"""Runs on disk: find, list and read them."""
