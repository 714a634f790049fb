"""From patterns to shards, and from shards to what is left to do; changes nothing but the plan."""
