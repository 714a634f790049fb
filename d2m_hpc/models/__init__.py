"""Model families, their checkpoints, and the columns and features made of their outputs."""
