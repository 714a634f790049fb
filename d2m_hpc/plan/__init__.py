"""From patterns to shards, and to the jobs that are left; writes nothing but a first config."""
