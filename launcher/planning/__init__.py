"""Planning: checks, memory estimate, environment and rendering of a plan."""
