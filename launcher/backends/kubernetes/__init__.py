"""Kubernetes: manifests, kubectl, and the entry point of every pod."""
