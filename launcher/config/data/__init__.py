"""The data group: where text comes from, and its file formats."""
