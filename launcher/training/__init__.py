"""Training and evaluation on ranks: trainer, recorder, checkpointing, preemption."""
