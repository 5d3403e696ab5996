"""The HTTP side of a server: OpenAI's interface over what the front offers."""
