"""`svl doctor`: what of a configuration will work, found out before anything heavy: model, memory, data, libraries."""
