"""Inference engines: scheduler, KV cache, sampler, model runner, and the loop around them."""
