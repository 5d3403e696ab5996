"""Pods of a Kubernetes cluster: names, manifests, kubectl."""
