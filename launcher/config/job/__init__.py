"""Group job: one dataclass for each kind of job, with its options and checks."""
