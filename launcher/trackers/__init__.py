"""Where a run is recorded besides its own directory."""
