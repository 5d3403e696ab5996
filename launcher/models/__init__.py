"""Model families: their shapes in plain Python, and how a rank builds one."""
