"""Where runs are mirrored: one tracker a file."""
