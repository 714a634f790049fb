"""Measurements against the conventional way, each with the target it has to meet.

`scripts/bench` lists them; benchmarks/README.md says what they compare.
"""
