"""Checkpoints as files: reading headers, exporting pruned ones, model cards, the hub."""
