"""Start the tasks of a decision: as array tasks of Slurm, or in this process."""
