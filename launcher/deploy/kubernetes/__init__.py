"""Manifests of a server in Kubernetes."""
