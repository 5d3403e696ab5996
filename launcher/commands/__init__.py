"""One file a verb, each with ``run(arguments) -> exit code``."""
