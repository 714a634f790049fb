"""Show a run to people: status, the terminal, verify, the report."""
