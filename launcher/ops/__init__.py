"""DeepSpeed's native operators: built once, by one process, before any rank starts.

DeepSpeed compiles an operator at its first use: in every rank at once, into a folder shared by all environments of the
user, with a lock that outlives a killed build and then blocks every later run forever.
"""
