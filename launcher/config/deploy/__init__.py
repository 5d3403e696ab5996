"""The deploy group: what ``launch deploy`` renders for a server."""
