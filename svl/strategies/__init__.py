"""Which layers go: one method a file."""
