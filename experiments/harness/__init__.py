"""What all studies share: run folders, records, loops, command lines."""
