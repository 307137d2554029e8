"""Scores of dense and pruned models: benchmarks, answers, metrics, their errors; speed and memory."""
