"""Generation for many requests at once: values, queue, engine, and the server in front of it."""
