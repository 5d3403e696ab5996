"""The model group: what a model is, in plain Python."""
