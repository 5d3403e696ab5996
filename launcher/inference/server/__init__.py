"""The HTTP server of ``job=serve``: OpenAI's API over engine processes. Imports no torch."""
