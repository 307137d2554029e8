"""Text from outside and to the outside: made safe for each kind of output, secrets hidden, command lines read."""
