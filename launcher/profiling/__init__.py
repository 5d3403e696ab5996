"""Recording a stretch of what a process computes, by torch's profiler; rank's side only."""
