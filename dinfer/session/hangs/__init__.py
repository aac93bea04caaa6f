"""The watch for hangs: what a verdict needs is gathered from the ranks, and asked for while they stand still."""
