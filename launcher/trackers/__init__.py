"""The tracker process beside rank 0, which sends metrics to W&B."""
