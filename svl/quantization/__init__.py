"""Quantisation that a pruned model is combined with: one method a file."""
