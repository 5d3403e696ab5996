"""Weights in fewer bits: the methods, and how a rank applies, saves and restores them.

In plain Python, without torch.
"""
