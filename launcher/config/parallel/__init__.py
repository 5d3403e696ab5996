"""Strategies: how one model is spread over ranks, and what that costs in memory."""
