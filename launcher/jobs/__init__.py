"""What runs on every rank: entry, context, and which executor a job has."""
