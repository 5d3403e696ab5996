"""Run and hosts to a plan: validation, warnings, memory, environment, render."""
