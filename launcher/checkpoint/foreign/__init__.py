"""Read checkpoints of DeepSpeed, torch.distributed.checkpoint, accelerate and Trainer.

All but ``plan`` import torch: for ranks only.
"""
