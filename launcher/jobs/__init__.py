"""What a rank does: one file a job."""
