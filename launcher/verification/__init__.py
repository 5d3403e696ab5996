"""The job verify: each parallel strategy compared with one process."""
