"""Canaries: a new version gets requests step by step, as long as its gates pass."""
