"""Read the shards of a task into batches in memory."""
