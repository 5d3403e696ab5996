"""Where processes start: submission, following, and entry points on the far side."""
