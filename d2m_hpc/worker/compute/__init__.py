"""Turn batches into models' outputs."""
