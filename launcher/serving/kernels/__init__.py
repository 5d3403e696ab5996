"""Faster forward passes on CPUs: stock models' layers, found by what they are made of, computed by ``native.c``."""
