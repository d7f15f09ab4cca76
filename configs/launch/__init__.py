"""Scripts that start a run on several hosts."""
