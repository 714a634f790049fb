"""Patterns to shards, and shards to the jobs that are left; changes nothing but the plan."""
