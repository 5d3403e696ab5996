"""What the pipeline engine is made of: models cut into stages, schedules, tied weights, balance, generation, state."""
