"""Turn models' outputs into a committed pair of files."""
