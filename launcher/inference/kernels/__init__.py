"""Compiled CPU kernels for the layers of stock models."""
