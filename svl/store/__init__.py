"""Finished stages on disk: the artifacts, what a store holds, and cleaning it."""
