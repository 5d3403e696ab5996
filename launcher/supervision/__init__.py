"""Start ranks, watch them, and report how they ended. Linux only.

    session (the command) ──JSON lines──▶ host agent ──▶ torchrun or deepspeed ──▶ rank monitor ──fork──▶ rank

The session decides, the agents act. When any of them dies, the others end the run and leave no process behind.
"""
