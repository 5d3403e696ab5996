"""Files of prompts to files of answers: the work of ``job=generate``."""
