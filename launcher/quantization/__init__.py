"""Weights in fewer bits: which methods there are, in plain Python, and how a rank applies, keeps and restores them."""
