"""Checkpoints of a run on disk: manifest, store, and finding one to resume from. Torch-free."""
