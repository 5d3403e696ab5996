"""Examine all hosts and the network between them before anything starts there."""
