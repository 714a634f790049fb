"""From batches to the outputs of models."""
