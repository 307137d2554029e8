"""Which tokens count: one method a file."""
