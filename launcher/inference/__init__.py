"""Inference: engines, kernels, the HTTP server, and files of prompts."""
