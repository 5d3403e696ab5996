"""Runs on disk: finding, listing and reading them."""
