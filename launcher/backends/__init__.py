"""Where processes start: this machine now, clusters later."""
