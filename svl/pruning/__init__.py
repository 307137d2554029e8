"""From a plan to a pruned model in memory: the config, the weights, the check that nothing else changed."""
