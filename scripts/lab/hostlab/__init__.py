"""Hosts for tests: machines that are namespaces of this one."""
