"""Starting ranks, staying with them, and telling the truth about how they ended. Linux only.

    session (the command)  ──JSON lines──▶  agent (one a host)  ──▶  torchrun or deepspeed  ──▶  guard  ──fork──▶  rank

The session decides, the agents act. Whoever of them dies, the others end the run and leave no process behind.
"""
