"""What the ranks hold beside transformers' own forward of the same checkpoint, and what the difference comes from."""
