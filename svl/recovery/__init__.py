"""Recovery: what little training heals of what pruning broke, at a stated cost. Optional; one method a file."""
