"""Slurm: batch script, submission, and the entry point of the job."""
