"""Dropping of visual tokens that a pruned model is combined with: one method a file."""
