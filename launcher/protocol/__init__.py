"""What both wings write and read: names in a run directory, records, messages."""
