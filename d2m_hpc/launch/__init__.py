"""On the login node: plan, submit, watch, check. Imports no torch."""
