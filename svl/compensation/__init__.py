"""What fills the gap that removed layers leave: one method a file."""
