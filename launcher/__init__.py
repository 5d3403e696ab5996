"""Compose, plan, launch and supervise language-model jobs."""

__version__ = "0.1.0"
