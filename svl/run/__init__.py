"""A run from configuration to result, alone or in a sweep."""
