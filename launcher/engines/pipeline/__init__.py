"""Pipeline parallelism on torch: engine, chunks, partition and schedules."""
