"""Tasks of lm-evaluation-harness; everything here needs the extra ``eval``."""
