"""The tracker process next to rank 0, which sends metrics to W&B."""
