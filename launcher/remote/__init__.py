"""Reaching a host: command lines, bootstrap, code bundle."""
