"""A load generator for OpenAI-compatible servers: standard library alone, so that it runs beside what it measures."""
