"""From an archive on shared storage to batches in memory."""
