"""DeepSpeed's native operators: built once, by one process, before any rank starts.

DeepSpeed compiles an operator where it is first used: in every rank at once, into a folder shared by all environments
of the user, behind a lock that outlives a killed build and then blocks every later run for ever.
"""
