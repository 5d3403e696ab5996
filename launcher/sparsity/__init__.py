"""Weights set to zero: which ones each method chooses, block by block of a model."""
