"""From the outputs of models to a committed pair of files."""
