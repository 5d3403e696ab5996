"""Read checkpoints of other programs: DeepSpeed, torch.distributed.checkpoint, accelerate, Trainer. For ranks only."""
