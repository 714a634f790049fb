"""Read archives from shared storage into batches in memory."""
