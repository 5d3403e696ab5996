"""What is measured on a machine: one file a benchmark, and what they share."""
