"""A decision becomes array tasks of Slurm, or a task in this process."""
