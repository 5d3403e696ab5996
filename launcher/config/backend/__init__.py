"""Options of the backends: where the processes of a run start."""
