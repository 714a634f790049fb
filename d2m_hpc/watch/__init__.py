"""A run as people see it: status, the terminal, verify, the report."""
