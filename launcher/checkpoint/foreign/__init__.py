"""Read checkpoints of other programs: DeepSpeed, torch.distributed.checkpoint, accelerate, Trainer.

All but ``plan`` import torch: for ranks only.
"""
