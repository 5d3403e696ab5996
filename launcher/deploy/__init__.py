"""Files that deploy a server: rendered from a Run and applied by other programs."""
