"""Pipeline parallelism on torch.distributed.pipelining: engine, chunks, partition, schedules."""
