"""What a session says of the KV that its ranks hold."""
