"""DeepSpeed engines: ZeRO and DeepSpeed's pipeline."""
