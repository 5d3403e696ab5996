"""Small helpers: text, files, limits of the machine, secrets."""
