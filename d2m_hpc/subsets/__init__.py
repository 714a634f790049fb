"""Read finished outputs as one table: selections, and files for other tools."""
