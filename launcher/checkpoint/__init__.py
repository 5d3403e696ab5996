"""Saving a run so that it continues exactly: policy, store and manifest."""
