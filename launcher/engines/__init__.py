"""Engines: how a training step is taken under each strategy (torch, DeepSpeed, pipeline)."""
